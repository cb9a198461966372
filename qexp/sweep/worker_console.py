"""Show what a worker says: each line behind the experiment's place in the sweep and what it is of.

[3/12] candidate: generating step 15/20, 133 ms a step
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Mapping
from typing import IO, Any

from qexp.sweep.console_lines import job_name
from qexp.sweep.live_display import DISPLAY
from qexp.system.screen import RECORD
from qexp.system.stages import Stage


class WorkerConsole(io.TextIOBase):
    """Where a worker's screen ends. of: reference or candidate; number, total: see `job_name`.

    stream: shows lines of text; None is standard output as it is then.
    """

    def __init__(self, of: str = "candidate", number: int | None = None, total: int | None = None) -> None:
        self.of, self.prefix, self.rest = of, job_name(number, total, of), ""
        self.stream: IO[str] | None = None

    def write(self, text: str) -> int:
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            if line.startswith(RECORD):
                self.show_record(json.loads(line[len(RECORD) :]))
            else:
                self._print(line)
        return len(text)

    def show_record(self, record: Mapping[str, Any]) -> None:
        """Show a stage: on the display, or else its line, if it has one."""
        stage = Stage(**record)
        if DISPLAY.is_shown:
            DISPLAY.show_stage(self.of, stage)
        elif stage.line:
            self._print(stage.line)

    def close(self) -> None:
        """End a last line that was left open. More may come: a worker that dies with its server is run again."""
        if self.rest:
            self.write("\n")

    def _print(self, line: str) -> None:
        print(f"{self.prefix}: {line.rpartition(chr(13))[2]}", file=self.stream or sys.stdout, flush=True)
