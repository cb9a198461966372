"""What this program says, apart from what libraries say.

Libraries warn of kernels for other machines, of deprecated names, and draw progress bars. That belongs into a log, and
the screen to the lines of this program. `say` prints a line as `print` to standard error does. Where standard output
and error have become a log, the line is shown on the screen as well: in a worker, whose screen is a pipe of its own,
and inside of `library_output_in`.

A record (`stages.py`) goes to what displays this work. From a worker it travels over its screen, as a line that begins
with RECORD.
"""

from __future__ import annotations

import io
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from io import TextIOBase
from typing import IO, Any

from qexp.system.standard_streams import PatientFile

RECORD = "\x1e"  # no text begins with ASCII's record separator

_screen: IO[str] | TextIOBase | None = None  # None while standard error is the screen
_follower: Callable[[Mapping[str, Any]], None] | None = None  # what displays this work; None if nothing does
_collected: list[str] | None = None  # where `sayings_in` keeps messages


def say(message: object, *, end: str = "\n") -> None:
    """Show a line of this program, and log it where there is a log."""
    if _collected is not None:
        _collected.append(str(message))
        return
    print(message, end=end, file=sys.stderr, flush=True)
    if _screen is not None:
        print(message, end=end, file=_screen, flush=True)


def is_followed() -> bool:
    """Return whether something displays this work."""
    return _follower is not None and _collected is None


def show_record(record: Mapping[str, Any], line: str = "") -> None:
    """Hand a record to what displays this work, and its line to the log, if there is one."""
    if line and _screen is not None:
        print(line, file=sys.stderr, flush=True)
    if _follower is not None:
        _follower(record)


def set_follower(follower: Callable[[Mapping[str, Any]], None] | None) -> None:
    """Have records of this process's work handed to `follower`, or with None to nobody."""
    global _follower
    _follower = follower


@contextmanager
def followed_by(follower: Callable[[Mapping[str, Any]], None]) -> Iterator[None]:
    """Have records handed to `follower` for a while."""
    before = _follower
    set_follower(follower)
    try:
        yield
    finally:
        set_follower(before)


def open_screen(descriptor: int) -> None:
    """Take a descriptor as this process's screen: from here on, standard output and error are a log."""
    os.set_inheritable(descriptor, False)
    screen = os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace")
    _set_screen(screen)
    set_follower(lambda record: print(f"{RECORD}{json.dumps(record)}", file=screen, flush=True))
    _say_own_warnings()


@contextmanager
def library_output_in(log: IO[bytes], screen: TextIOBase | None = None) -> Iterator[None]:
    """Send what this process prints to a log, but for what it says.

    log: a file, open for writing. screen: for what it says; None is what standard error is now.
    """
    before, shown = _screen, screen or _screen or copy_of(sys.stderr)
    kept = {number: os.dup(number) for number in (1, 2)}
    sys.stdout.flush()
    sys.stderr.flush()
    text = os.fdopen(os.dup(log.fileno()), "w", encoding="utf-8", errors="backslashreplace", buffering=1)
    handler = _say_own_warnings()
    try:
        for number in kept:  # libraries print from C, too, and log to streams that they took before
            os.dup2(log.fileno(), number)
        with text, redirect_stdout(text), redirect_stderr(text):
            _set_screen(shown)
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


def _set_screen(screen: IO[str] | TextIOBase | None) -> None:
    global _screen
    _screen = screen


def copy_of(stream: Any) -> IO[str]:
    """Return a stream to the same place that does not follow its descriptor; the stream itself where it has none."""
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
