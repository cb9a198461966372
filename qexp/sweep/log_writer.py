"""Log finished runs to Weights & Biases in a process of its own, so that the next experiment does not wait for it.

    python -m qexp.sweep.log_writer --parent <pid>

reads a run a line, as JSON: {"folder", "config", "group", "settings"}, and ends with its input. It has a low priority:
what it does beside an experiment must not show in the experiment's times.
"""

from __future__ import annotations

import argparse
import atexit
import fcntl
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from qexp.config.schema import RunConfig
from qexp.errors import MissingLibraryError
from qexp.experiments.stored import run_config_from_container
from qexp.results.outcome import outcome_of
from qexp.results.run_folder import RunFolder
from qexp.system.child_process import die_with_parent
from qexp.system.standard_streams import survive_closed_pipes
from qexp.tracking.session import import_wandb

PIPE_BYTES = 1 << 20  # some 300 runs can wait to be logged before the sweep waits for the process
LOWER = 10  # of 19: a tenth of the weight of others, where cores are not free


def log_run(folder: Path, config: RunConfig, group: str | None, settings: str = "") -> None:
    """Log a run. A failure costs the log, never the result, and is said. settings: see `wandb_run.log_run`."""
    try:
        from qexp.tracking.wandb_run import log_run

        log_run(folder, config, group, settings)
    except Exception as error:
        print(f"warning: {folder} is not tracked: {outcome_of(error).message}", file=sys.stderr, flush=True)


class LogWriter:
    """The process, from the parent's side; started when it is first wanted."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.printers: list[threading.Thread] = []

    def start(self) -> subprocess.Popen[str]:
        """Have it import W&B's library meanwhile."""
        if self.process is None:
            command = [sys.executable, "-m", "qexp.sweep.log_writer", "--parent", str(os.getpid())]
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,  # on the terminal only this process prints
                stderr=subprocess.PIPE,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,
            )
            outputs = {"stdout": self.process.stdout, "stderr": self.process.stderr}
            self.printers = [threading.Thread(target=_pass_on, args=each, daemon=True) for each in outputs.items()]
            for printer in self.printers:
                printer.start()
            assert self.process.stdin is not None
            with suppress(OSError):  # the system may allow less
                fcntl.fcntl(self.process.stdin, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        return self.process

    def log(self, folder: Path, config: RunConfig, group: str | None, settings: str = "") -> None:
        """Log a run soon: after those before it, and as soon as its folder is no longer locked."""
        order: dict[str, Any] = {"folder": str(folder.absolute()), "config": config.to_container()}
        order |= {"group": group, "settings": settings}
        try:
            stdin = self.start().stdin
            assert stdin is not None
            stdin.write(f"{json.dumps(order)}\n")
            stdin.flush()
        except OSError as error:  # it was killed
            self.process = None
            print(f"warning: {folder} is not tracked: the process that logs runs has ended ({error})", file=sys.stderr)

    def close(self) -> None:
        """Wait until everything is logged."""
        process, self.process = self.process, None
        if process is not None and process.stdin is not None:
            with suppress(OSError):
                process.stdin.close()
            with suppress(OSError):  # nothing runs beside it any more; not everybody may raise a priority
                os.setpriority(os.PRIO_PGRP, process.pid, 0)
            process.wait()
            for printer in self.printers:
                printer.join()


def _pass_on(name: str, lines: Iterable[str]) -> None:
    """Print lines on this process's stdout or stderr, whatever that is at the time."""
    for line in lines:
        print(line, end="", file=getattr(sys, name), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m qexp.sweep.log_writer", description="Log runs named on stdin.")
    parser.add_argument("--parent", type=int, required=True, help="end when this process does")
    die_with_parent(parser.parse_args().parent)
    _give_way()
    with suppress(MissingLibraryError):  # `log_run` says it
        import_wandb()
    for line in sys.stdin:
        order = json.loads(line)
        folder = RunFolder(order["folder"])
        with folder.locked(lambda message: None):  # the experiment's own process has it for a moment more
            log_run(folder.path, run_config_from_container(order["config"]), order["group"], order["settings"])
    return 0


def _give_way() -> None:
    """Lower the priority; where the system weighs sessions and not processes (autogroup), of the session too."""
    os.nice(LOWER)
    with suppress(OSError):
        Path("/proc/self/autogroup").write_text(str(LOWER), encoding="utf-8")


WRITER = LogWriter()
atexit.register(WRITER.close)

if __name__ == "__main__":
    survive_closed_pipes()
    sys.exit(main())
