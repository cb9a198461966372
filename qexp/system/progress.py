"""Progress of long work: a stage for what displays it, else one line rewritten on a terminal, a few lines elsewhere."""

from __future__ import annotations

import sys
import time

from qexp.system.memory import GIB
from qexp.system.screen import say
from qexp.system.stages import Stage, show_stage


class Progress:
    """Counts items and bytes. Without a display it is silent for work that ends within a second.

    title: whose work it is; words: what is done, with {} where the number of items stands ('loading {} tensors').
    """

    def __init__(self, title: str, words: str, total_items: int, total_bytes: int) -> None:
        self._title, self._words = title, words
        self._total_items, self._total_bytes = total_items, max(total_bytes, 1)
        self._items = self._bytes = self._shown_quarter = 0
        self._started = self._shown_at = time.monotonic()
        show_stage(self._stage(""))

    def advance(self, nbytes: int, items: int = 1) -> None:
        self._items, self._bytes = self._items + items, self._bytes + nbytes
        now = time.monotonic()
        quarter, is_long = 4 * self._bytes // self._total_bytes, now - self._started >= 1
        is_terminal = is_long and sys.stderr.isatty()  # a call of the system, which short work goes without
        is_due = is_long and (now - self._shown_at > 0.2 if is_terminal else quarter > self._shown_quarter)
        is_followed = show_stage(self._stage(self._line() if is_due else ""))
        if is_due:
            self._shown_at, self._shown_quarter = now, quarter
            if not is_followed:
                say(f"\r{self._line()}" if is_terminal else self._line(), end="" if is_terminal else "\n")

    def close(self) -> None:
        is_followed = show_stage(self._stage(""))
        if not is_followed and sys.stderr.isatty() and self._shown_at > self._started:
            say(f"\r{self._line()}")

    def _stage(self, line: str) -> Stage:
        seconds, total = time.monotonic() - self._started, (self._total_items, self._total_bytes)
        return Stage(self._words, self._items, total[0], self._bytes, total[1], seconds, line)

    def _line(self) -> str:
        gib, seconds = f"{self._bytes / GIB:.2f}/{self._total_bytes / GIB:.2f} GiB", time.monotonic() - self._started
        return f"{self._title}: {self._words.format(f'{self._items}/{self._total_items}')}, {gib}, {seconds:.0f} s"
