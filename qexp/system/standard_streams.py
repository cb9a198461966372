"""Standard output and error whose reader may go away: `qexp report | head` loses lines, not the work.

A write to a pipe that nobody reads fails (EPIPE), wherever a line happens to be printed: in the middle of an
experiment, or between a table and its files. From then on such a stream goes nowhere, and the program goes on.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Any


class PatientFile(io.FileIO):
    """Writes into nothing once nobody reads."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())  # of what this process starts, and of native code, too
            os.close(nowhere)
            return len(memoryview(data).cast("B"))


def survive_closed_pipes() -> None:
    """Replace `sys.stdout` and `sys.stderr`, unless somebody has replaced them already (a notebook, a test)."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if type(stream) is io.TextIOWrapper and not isinstance(_raw_of(stream), PatientFile):
            stream.flush()
            setattr(sys, name, _patient(stream))


def _raw_of(stream: io.TextIOWrapper) -> Any:
    return getattr(stream.buffer, "raw", stream.buffer)


def _patient(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    """Return the same stream over a file that outlives its reader."""
    raw = PatientFile(stream.fileno(), "w", closefd=False)
    is_buffered = isinstance(stream.buffer, io.BufferedWriter)  # python -u has none
    return io.TextIOWrapper(
        io.BufferedWriter(raw) if is_buffered else raw,
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
