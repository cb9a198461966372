"""Record what a person sees in a terminal while a sweep runs, and put frames of it into docs/sweep_display.md.

    python scripts/record_sweep.py            # prints the frames
    python scripts/record_sweep.py --write    # puts them into the page

A real sweep of the embedded model in a pseudo-terminal, whose output a terminal emulator (pyte) turns into text.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pyte

PAGE = Path(__file__).parents[1] / "docs" / "sweep_display.md"
BEGIN, END = "<!-- frames: scripts/record_sweep.py --write -->", "<!-- end of frames -->"
COLUMNS, ROWS = 110, 40
QUIET_SECONDS = 0.03  # without output, after which a frame is complete
SWEEP = (
    "python -m qexp -m backend=quanto skip_modules=[proj_out],[heads] seed=0,1 device=cpu tracking=none "
    "sweep.name=shown"
)
WANTED = (  # the first frame with each of these, in the order in which they come
    "reference: reading",
    "reference step 10/20",
    "quantizing",
    "generating step 10/20",
    "1 failed",
    "2 done",
)


def record(command: Sequence[str], folder: Path, variables: Mapping[str, str] | None = None) -> tuple[list[str], int]:
    """Run a command in a terminal of its own; returns every frame, and the exit code. folder: to run it in."""
    terminal, inside = pty.openpty()
    fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    size = {"COLUMNS": str(COLUMNS), "LINES": str(ROWS)}  # what runs this may have set them for another terminal
    environment = {**os.environ, **size, "TERM": "xterm-256color", **(variables or {})}
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdin=inside, stdout=inside, stderr=inside, start_new_session=True
    )
    os.close(inside)
    screen = pyte.Screen(COLUMNS, ROWS)
    stream, frames = pyte.ByteStream(screen), [""]
    while True:
        if not select.select([terminal], [], [], QUIET_SECONDS)[0]:
            frame = "\n".join(line.rstrip() for line in screen.display).rstrip()
            if frame != frames[-1]:
                frames.append(frame)
            continue
        try:
            data = os.read(terminal, 1 << 16)
        except OSError:  # nobody has it open any more
            break
        if not data:
            break
        stream.feed(data)
    os.close(terminal)
    frames.append("\n".join(line.rstrip() for line in screen.display).rstrip())
    return frames[1:], process.wait()


def chosen_frames(frames: Sequence[str], wanted: Sequence[str] = WANTED) -> list[str]:
    """Return the first frame with each of the wanted words after the one before, and the last frame."""
    chosen, rest = [], iter(frames[:-1])
    for words in wanted:
        frame = next((frame for frame in rest if words in frame), None)
        if frame is None:
            raise SystemExit(f"no frame with '{words}' follows; change WANTED, or the sweep")
        chosen.append(frame)
    return [*chosen, frames[-1]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the frames into docs/sweep_display.md")
    arguments = parser.parse_args()
    started = time.monotonic()
    with TemporaryDirectory() as folder:
        frames, code = record([sys.executable, *SWEEP.split()[1:]], Path(folder))
    print(f"{len(frames)} frames in {time.monotonic() - started:.0f} s, exit code {code}", file=sys.stderr)
    text = "\n\n".join(f"```\n{frame}\n```" for frame in chosen_frames(frames))
    if not arguments.write:
        print(text)
        return 0
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, tail = rest.partition(END)
    PAGE.write_text(f"{head}{BEGIN}\n\n```\n{SWEEP}\n```\n\n{text}\n\n{END}{tail}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
