"""What a person sees in a terminal while experiments run, as lines of text; `live_display.py` puts them there.

[3/12] digits · quanto int8 · leaf→disk · generate · seed=1
       reference step 8/20, 12 s left
1 done, 1 failed, 10 left, about 4 min left
failed: [2/12] digits · quanto int2 · none · generate · seed=1: oom: out of memory …
        log: outputs/runs/0123456789abcdef/worker.log
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from qexp.results.manifest import JobRow, jobs_left
from qexp.results.numbers import format_duration, format_memory
from qexp.system.memory import GIB
from qexp.system.stages import Stage

MOST_FAILURES = 5  # shown at once, the latest; the lines of all of them are above, and below the table in the end
INDENT = " " * 7


class SweepView:
    """What runs, how far it is, and how the experiments before it ended. clock: seconds, of any beginning."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.name, self.began = "", 0.0  # of the running experiment; '' between two
        self.stage: tuple[str, Stage, float] | None = None  # of reference or candidate, and when it was shown
        self.statuses: Counter[str] = Counter()
        self.left: int | None = None  # experiments that have not ended; None outside of a sweep, or if unknown
        self.durations: list[float] = []  # of experiments that were not just reused
        self.failures: list[tuple[str, str]] = []  # what failed and why, and its log

    def begin(self, name: str, left: int | None) -> None:
        """Show that an experiment begins. left: experiments that have not ended, this one included."""
        self.name, self.began, self.stage, self.left = name, self.clock(), None, left

    def show_stage(self, of: str, stage: Stage) -> None:
        self.stage = of, stage, self.clock()

    def end(self, row: JobRow, manifest: Mapping[str, Any] | None, log: Path | None) -> None:
        """Show that the running experiment has ended, with the outcome in its row."""
        if not row.reused:
            self.durations.append(self.clock() - self.began)
        if row.status == "failed":
            self.failures.append((f"{self.name}: {row.reason}: {' '.join(row.message.split())}", str(log or "")))
        self.statuses = Counter(job["status"] for job in (manifest["jobs"] if manifest else ()))
        self.left = jobs_left(manifest)
        self.name, self.stage = "", None

    def lines(self) -> list[tuple[str, str]]:
        """(text, 'running', 'sweep' or 'failed') of each line."""
        lines = [(self.name, "running"), (INDENT + self._stage_words(), "sweep")] if self.name else []
        if words := self._sweep_words():
            lines.append((words, "sweep"))
        hidden = len(self.failures) - MOST_FAILURES
        for what, log in self.failures[-MOST_FAILURES:]:
            lines.append((f"failed: {what}", "failed"))
            lines += [(f"        log: {log}", "failed")] if log else []
        return lines + ([(f"        and {hidden} more", "failed")] if hidden > 0 else [])

    def _stage_words(self) -> str:
        """'quantizing 37/120 layers, 1.2 of 9.6 MiB, 12 s left'."""
        if self.stage is None:
            return f"starting, {format_duration(self.clock() - self.began)}"
        of, stage, at = self.stage
        words = stage.describe()
        if of == "reference":  # 'reference step 8/20', 'reference: quantizing 37/120 layers'
            verb, step, count = words.rpartition("step ")
            words = f"reference {step}{count}" if verb else f"reference: {words}"
        done, total = (format_memory(nbytes / GIB) for nbytes in (stage.done_bytes, stage.total_bytes))
        left = stage.seconds_left()
        parts = [words, f"{done} of {total}" if stage.total_bytes else ""]
        parts += [f"{format_duration(max(left - (self.clock() - at), 0))} left" if left is not None else ""]
        return ", ".join(filter(None, parts))

    def _sweep_words(self) -> str:
        """'1 done, 1 failed, 10 left, about 4 min left'; '' outside of a sweep."""
        if self.left is None and not self.statuses:
            return ""
        counts = {status: self.statuses[status] for status in dict.fromkeys(("done", "failed", *self.statuses))}
        parts = [f"{count} {status}" for status, count in counts.items()]
        parts += [f"{self.left} left"] if self.left is not None else []
        if self.left and self.durations:
            running = self.clock() - self.began if self.name else 0.0
            parts.append(f"about {format_duration(max(fmean(self.durations) * self.left - running, 0))} left")
        return ", ".join(parts)
