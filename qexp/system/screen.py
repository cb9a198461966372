"""What this program says, apart from what libraries say.

Libraries warn of kernels for other machines, of deprecated names, and draw progress bars. That belongs into a log, and
the screen to the lines of this program. `say` prints a line as `print` to standard error does. Where standard output
and error have become a log, the line is shown on the screen as well: in a worker, whose screen is a pipe of its own,
and inside of `library_output_in`.
"""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import IO, Any

from qexp.system.standard_streams import PatientFile

_screen: IO[str] | None = None  # None while standard error is the screen
_collected: list[str] | None = None  # where `sayings_in` keeps messages


def say(message: object, *, end: str = "\n") -> None:
    """Show a line of this program, and log it where there is a log."""
    if _collected is not None:
        _collected.append(str(message))
        return
    print(message, end=end, file=sys.stderr, flush=True)
    if _screen is not None:
        print(message, end=end, file=_screen, flush=True)


def open_screen(descriptor: int) -> None:
    """Take a descriptor as this process's screen: from here on, standard output and error are a log."""
    os.set_inheritable(descriptor, False)
    _set_screen(os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace"))
    _say_own_warnings()


@contextmanager
def library_output_in(log: IO[bytes]) -> Iterator[None]:
    """Send what this process prints to a log, but for what it says. log: a file, open for writing."""
    before, screen = _screen, _screen or _copy_of(sys.stderr)
    kept = {number: os.dup(number) for number in (1, 2)}
    sys.stdout.flush()
    sys.stderr.flush()
    text = os.fdopen(os.dup(log.fileno()), "w", encoding="utf-8", errors="backslashreplace", buffering=1)
    handler = _say_own_warnings()
    try:
        for number in kept:  # libraries print from C, too, and log to streams that they took before
            os.dup2(log.fileno(), number)
        with text, redirect_stdout(text), redirect_stderr(text):
            _set_screen(screen)
            yield
    finally:
        _set_screen(before)
        logging.getLogger("qexp").removeHandler(handler)
        for number, descriptor in kept.items():
            os.dup2(descriptor, number)
            os.close(descriptor)


@contextmanager
def sayings_in(messages: list[str]) -> Iterator[None]:
    """Keep what is said in a list instead of showing it."""
    global _collected
    before, _collected = _collected, messages
    try:
        yield
    finally:
        _collected = before


def _set_screen(screen: IO[str] | None) -> None:
    global _screen
    _screen = screen


def _copy_of(stream: Any) -> IO[str]:
    """A stream to the same place that does not follow its descriptor; the stream itself where it has none."""
    with suppress(OSError, AttributeError, ValueError):
        if stream.fileno() in (1, 2):
            copy = io.BufferedWriter(PatientFile(os.dup(stream.fileno()), "w"))
            return io.TextIOWrapper(copy, encoding=stream.encoding, errors="backslashreplace")
    return stream


class _OwnWarnings(logging.Handler):
    """Says what the modules of this program log as warnings."""

    def emit(self, record: logging.LogRecord) -> None:
        say(f"{record.levelname.lower()}: {record.getMessage()}")


def _say_own_warnings() -> logging.Handler:
    handler = _OwnWarnings(logging.WARNING)
    logging.getLogger("qexp").addHandler(handler)
    return handler
