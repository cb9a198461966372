"""Progress of long work on standard error: one line rewritten on a terminal, a few lines elsewhere."""

from __future__ import annotations

import sys
import time

from qexp.system.memory import GIB
from qexp.system.screen import say


class Progress:
    """Counts items (of which `unit` is the plural) and bytes. Silent for work that ends within a second."""

    def __init__(self, title: str, total_items: int, total_bytes: int, unit: str = "tensors") -> None:
        self._title, self._total_items, self._total_bytes = title, total_items, max(total_bytes, 1)
        self._unit = unit
        self._items = self._bytes = self._shown_quarter = 0
        self._started = self._shown_at = time.monotonic()

    def advance(self, nbytes: int, items: int = 1) -> None:
        self._items, self._bytes = self._items + items, self._bytes + nbytes
        now = time.monotonic()
        if now - self._started < 1:
            return
        quarter = 4 * self._bytes // self._total_bytes
        due = now - self._shown_at > 0.2 if sys.stderr.isatty() else quarter > self._shown_quarter
        if due:
            self._shown_at, self._shown_quarter = now, quarter
            self._show("\r" if sys.stderr.isatty() else "", "" if sys.stderr.isatty() else "\n")

    def close(self) -> None:
        if sys.stderr.isatty() and self._shown_at > self._started:
            self._show("\r", "\n")

    def _show(self, before: str, after: str) -> None:
        seconds = time.monotonic() - self._started
        line = (
            f"{self._title} {self._items}/{self._total_items} {self._unit}, "
            f"{self._bytes / GIB:.2f}/{self._total_bytes / GIB:.2f} GiB, {seconds:.0f} s"
        )
        say(f"{before}{line}", end=after)
