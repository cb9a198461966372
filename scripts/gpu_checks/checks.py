"""One check is one row. What a check raises becomes the row's message, and the next one runs."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from typing import Any

PASSED, FAILED, SKIPPED, UNSUPPORTED = "passed", "failed", "skipped", "unsupported"
BAD = (FAILED, SKIPPED)

Numbers = dict[str, Any]
Outcome = tuple[Numbers, list[str]]  # (what was measured, the rules that do not hold)


class DeviceLost(Exception):
    """The device answers no more; this process cannot go on with it."""


@dataclass
class Row:
    """group: loading, offload, speed or target. numbers: by name, units in the names."""

    group: str
    name: str
    status: str = PASSED
    message: str = ""
    seconds: float = 0.0
    numbers: Numbers = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Checks:
    """Runs checks one after the other; those whose names are in `done` ran in a process before this one.

    begin(name) is told before a check, end(row) after it: what dies in between has a name.
    """

    def __init__(
        self,
        begin: Callable[[str], None],
        end: Callable[[Row], None],
        *,
        deadline: float,
        done: Collection[str] = (),
        device_works: Callable[[], bool] = lambda: True,
    ) -> None:
        """deadline: of time.monotonic(); checks that would start later are skipped."""
        self._begin, self._end, self._done = begin, end, frozenset(done)
        self.deadline, self._device_works = deadline, device_works

    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def is_done(self, group: str, name: str) -> bool:
        return f"{group}: {name}" in self._done

    def run(self, group: str, name: str, check: Callable[[], Outcome]) -> Row | None:
        """Run one check; None if it was done before. Raises DeviceLost after the row of one that broke the device."""
        if self.is_done(group, name):
            return None
        row, started = Row(group, name), time.monotonic()
        if self.seconds_left() <= 0:
            row.status, row.message = SKIPPED, "out of time"
            self._end(row)
            return row
        self._begin(f"{group}: {name}")
        try:
            row.numbers, broken = check()
            row.status, row.message = (FAILED, "; ".join(broken)) if broken else (PASSED, "")
        except Exception as error:
            row.status, row.message = status_of(error), describe(error)
        row.seconds = round(time.monotonic() - started, 3)
        self._end(row)
        if row.status == FAILED and not self._device_works():
            raise DeviceLost(row.name)
        return row


def status_of(error: Exception) -> str:
    """unsupported: this hardware cannot run it, and says so itself. What is not installed has failed."""
    from qexp.errors import MissingLibraryError, UnsupportedError

    missing = isinstance(error, MissingLibraryError)
    return UNSUPPORTED if isinstance(error, UnsupportedError) and not missing else FAILED


def describe(error: BaseException) -> str:
    """Class, message and the place that raised, in one line."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" [{frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno}]" if frames else ""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:600]}{place}"
