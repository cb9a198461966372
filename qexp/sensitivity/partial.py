"""The scores of a run so far: a line of partial.jsonl for each group that is done, so that a killed run goes on.

The first line says what they are scores of. A file of another kind, or another version's, is begun anew; the last line
may have been cut off, and does not count then.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from qexp.results.run_folder import PARTIAL
from qexp.system.files import append_line, disk_error
from qexp.system.screen import say

Scores = dict[str, float]  # format -> score


class PartialScores:
    """Scores of groups by (component, name of the group); shows progress, and the time that is left."""

    def __init__(self, folder: Path, identity: Mapping[str, object], total: int, *, anew: bool = False) -> None:
        self._path, self._total = folder / PARTIAL, total
        first = json.dumps(identity, sort_keys=True)
        self.done: dict[tuple[str, str], Scores] = {} if anew else _read(self._path, first)
        if not self.done:
            _unlink(self._path)
            append_line(self._path, first)
        self._count = self._before = sum(map(len, self.done.values()))
        self._started = self._shown_at = time.monotonic()
        if self._before:
            say(f"sensitivity: going on after {self._before} of {total} scores")

    def add(self, component: str, group: str, scores: Scores) -> None:
        """Keep the scores of a group. Raises DiskError."""
        append_line(self._path, json.dumps([component, group, scores]))
        self.done[component, group] = scores
        self._count += len(scores)
        self._show()

    def remove(self) -> None:
        """Remove the file: the table is written."""
        _unlink(self._path)

    def _show(self) -> None:
        """Rewrite one line on a terminal; elsewhere write one every ten seconds."""
        now, is_terminal = time.monotonic(), sys.stderr.isatty()
        if now - self._shown_at < (0.2 if is_terminal else 10) and self._count < self._total:
            return
        self._shown_at = now
        left = (now - self._started) / (self._count - self._before) * (self._total - self._count)
        line = f"sensitivity: {self._count}/{self._total} scores, {now - self._started:.0f} s, {left:.0f} s left"
        last = self._count >= self._total
        say(f"\r{line}\x1b[K" if is_terminal else line, end="\n" if last or not is_terminal else "")


def _read(path: Path, first: str) -> dict[tuple[str, str], Scores]:
    with suppress(OSError, ValueError):
        header, *lines = path.read_text(encoding="utf-8").splitlines()
        if header == first:
            return _scores_of(lines)
    return {}


def _scores_of(lines: list[str]) -> dict[tuple[str, str], Scores]:
    found = {}
    for line in lines:
        try:
            component, group, scores = json.loads(line)
            found[str(component), str(group)] = {str(name): float(score) for name, score in scores.items()}
        except (ValueError, TypeError, AttributeError):  # cut off when the process was killed
            continue
    return found


def _unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise disk_error(path, error) from error
