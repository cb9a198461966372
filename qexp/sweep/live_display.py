"""Keep the lines of `sweep_view.py` at the bottom of a terminal while experiments run; nothing where there is none.

What is printed meanwhile goes above them. Processes that this one starts must not print to the terminal themselves.
"""

from __future__ import annotations

import atexit
import io
import os
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from qexp.results.manifest import JobRow
from qexp.sweep.sweep_view import SweepView
from qexp.system.screen import copy_of, set_follower
from qexp.system.stages import Stage

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

REFRESHES_PER_SECOND = 4
STYLES = {"running": "bold", "failed": "red", "sweep": ""}


class LiveDisplay:
    """The display of this process; `begin` starts it where standard output is a terminal that can move its cursor."""

    def __init__(self) -> None:
        self.view = SweepView(time.monotonic)
        self.live: Live | None = None
        self.before: tuple[IO[str], IO[str]] = sys.stdout, sys.stderr

    @property
    def is_shown(self) -> bool:
        return self.live is not None

    def begin(self, name: str, left: int | None) -> None:
        """Show that an experiment runs. left: how many of a sweep have not ended, with this one."""
        if self.live is None and is_interactive(sys.stdout):
            self._start()
        self.view.begin(name, left)
        self._refresh()

    def show_stage(self, of: str, stage: Stage) -> None:
        """Show how far the running experiment is. of: reference or candidate."""
        is_new = self.view.stage is None or self.view.stage[1].words != stage.words
        self.view.show_stage(of, stage)
        if is_new:  # counts can wait
            self._refresh()

    def end(self, row: JobRow, manifest: Mapping[str, Any] | None, log: Path | None) -> None:
        """Show how the running experiment ended. log: of what it printed, if there is one."""
        self.view.end(row, manifest, log)
        self._refresh()

    def close(self) -> None:
        """Take the lines away, and forget what was shown."""
        if self.live is not None:
            self.live.stop()
            self.live = None
            sys.stdout, sys.stderr = self.before
            set_follower(None)
        self.view = SweepView(time.monotonic)

    def _start(self) -> None:
        from rich.console import Console
        from rich.live import Live

        console = Console(file=copy_of(sys.stdout), highlight=False)  # libraries' output in a log is not its own
        self.live = Live(
            console=console,
            get_renderable=lambda: self._rendered(console.width),
            refresh_per_second=REFRESHES_PER_SECOND,
            transient=True,
            redirect_stdout=False,  # rich's would break lines at the terminal's width, and paths with them
            redirect_stderr=False,
        )
        self.before = sys.stdout, sys.stderr
        above = _Above(console)
        sys.stdout = above
        if sys.stderr.isatty():
            sys.stderr = above
        set_follower(lambda record: self.show_stage("", Stage(**record)))  # a download before an experiment
        self.live.start()

    def _rendered(self, width: int) -> Text:
        from rich.text import Text

        lines = []
        for text, kind in self.view.lines():
            line = Text(text, STYLES[kind])
            line.truncate(width, overflow="ellipsis")
            lines.append(line)
        return Text("\n").join(lines)

    def _refresh(self) -> None:
        if self.live is not None:
            self.live.refresh()


class _Above(io.TextIOBase):
    """Standard output and error while the display is there: whole lines, above it."""

    encoding = "utf-8"

    def __init__(self, console: Console) -> None:
        self.console, self.rest, self.lock = console, "", threading.Lock()

    def write(self, text: str) -> int:
        from rich.text import Text

        with self.lock:
            *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:  # of a line that was rewritten, what stands last
            self.console.print(Text.from_ansi(line.rpartition("\r")[2]), soft_wrap=True)
        return len(text)

    def isatty(self) -> bool:
        return True


def is_interactive(stream: Any) -> bool:
    """Return whether a stream is a terminal whose lines can be rewritten."""
    return stream.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")


DISPLAY = LiveDisplay()
atexit.register(DISPLAY.close)
