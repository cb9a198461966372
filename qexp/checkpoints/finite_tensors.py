"""Remember which tensors of a file hold finite values alone, so that a file that is mapped is searched once.

Nothing of a mapped tensor is read while it is loaded, but by the search for infinities and NaN, which reads all of it.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress

from qexp.checkpoints.file_facts import is_settled, recall_fact, remember_fact
from qexp.checkpoints.regular_file import FileState
from qexp.checkpoints.tensor_entry import TensorEntry

KIND = "finite"  # of fact
VERSION = 1  # of how a tensor is searched

Span = tuple[int, int]  # of bytes in a file: from, to


class FiniteTensors:
    """What one load knows and finds. Tensors are told apart by where they begin and end in their file."""

    def __init__(self) -> None:
        self._began_ns = time.time_ns()
        self._known: dict[FileState, set[Span]] = {}
        self._found: dict[FileState, set[Span]] = {}

    def __contains__(self, entry: TensorEntry) -> bool:
        return entry.state is not None and _span(entry) in self._known_of(entry.state)

    def add(self, entry: TensorEntry) -> None:
        """Take down that a tensor was searched, and is finite."""
        if entry.state is not None:
            self._found.setdefault(entry.state, set()).add(_span(entry))

    def keep(self) -> None:
        """Write down what was found, of files that have not changed meanwhile, which the caller has checked."""
        for state, spans in self._found.items():
            if is_settled(state, self._began_ns):
                remember_fact(KIND, json.dumps(sorted(spans | self._known_of(state))), VERSION, state)

    def _known_of(self, state: FileState) -> set[Span]:
        if state not in self._known:
            known = set[Span]()
            with suppress(ValueError, TypeError):  # damaged: it is searched again
                fact = recall_fact(KIND, VERSION, state)
                known = set() if fact is None else {(int(start), int(stop)) for start, stop in json.loads(fact)}
            self._known[state] = known
        return self._known[state]


def _span(entry: TensorEntry) -> Span:
    return entry.offset, entry.offset + entry.nbytes
