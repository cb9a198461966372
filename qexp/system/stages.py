"""How far an experiment is, for a person who watches: stages such as 'quantizing 37/120 layers'.

A worker sends them over its screen (`screen.py`) to the process that started it, whose terminal shows one at a time.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass

from qexp.system.screen import is_followed, show_record

INTERVAL_SECONDS = 0.1  # between two records of one stage: a terminal is not read faster


@dataclass(frozen=True)
class Stage:
    """What an experiment does at the moment.

    words: with {} where the count stands, if anything is counted: 'quantizing {} layers', 'generating step {}'.
    total: None where it is not known. total_bytes: 0 where no bytes are counted. seconds: since the stage began.
    line: for where nothing is rewritten, such as a file; '' between the few counts that have one.
    """

    words: str
    done: int = 0
    total: int | None = None
    done_bytes: int = 0
    total_bytes: int = 0
    seconds: float = 0.0
    line: str = ""

    def describe(self) -> str:
        """'quantizing 37/120 layers'."""
        return self.words.format(f"{self.done}/{self.total}" if self.total else self.done)

    def seconds_left(self) -> float | None:
        """Estimate the seconds left at the pace so far, by bytes where they are counted; None if that is not known."""
        done, total = (self.done_bytes, self.total_bytes) if self.total_bytes else (self.done, self.total)
        return self.seconds * (total - done) / done if done and total else None


_shown = ("", 0.0)  # words of the last stage that was handed on, and when


def show_stage(stage: Stage) -> bool:
    """Hand a stage to what displays this work, if something does; returns whether.

    Counts follow each other within a tenth of a second or more, but the last one, and those with a line, always come.
    """
    global _shown
    if not is_followed():
        return False
    words, at = _shown
    now = time.monotonic()
    if stage.words != words or stage.done == stage.total or stage.line or now - at >= INTERVAL_SECONDS:
        _shown = (stage.words, now)
        show_record(asdict(stage), stage.line)
    return True
