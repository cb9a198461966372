"""A mix: one format for each group of layers, and where the group rests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qexp.sensitivity.table import DENSE, Candidate

Key = tuple[str, str]  # (component, group)


@dataclass(frozen=True)
class Mix:
    """choices: one candidate of each group; away: the groups that rest on the CPU or on disk, and travel each step."""

    choices: tuple[Candidate, ...]
    away: frozenset[Key] = field(default_factory=frozenset)

    @property
    def nbytes(self) -> int:
        """Bytes of all groups, wherever they rest."""
        return sum(choice.nbytes for choice in self.choices)

    @property
    def score(self) -> float:
        """The predicted error of the model's output: scores add up."""
        return sum(choice.score for choice in self.choices)

    @property
    def formats(self) -> dict[str, int]:
        """Format -> number of layers in it, the most frequent first."""
        counts = Counter[str]()
        for choice in self.choices:
            counts[choice.format] += len(choice.layers)
        return dict(counts.most_common())

    def travelling(self, extra: Mapping[Key, int]) -> list[int]:
        """Return bytes of each group that travels.

        extra: (component, group) -> bytes beside its weights (biases, padding).
        """
        return [choice.nbytes + extra.get(key_of(choice), 0) for choice in self.choices if key_of(choice) in self.away]


def key_of(candidate: Candidate) -> Key:
    return candidate.component, candidate.group


def uniform_mix(groups: Sequence[Sequence[Candidate]], name: str) -> Mix:
    """Return every group in one format; groups that it cannot hold stay dense."""
    return Mix(tuple(choice_of(group, name) for group in groups))


def choice_of(group: Sequence[Candidate], name: str) -> Candidate:
    """Return the candidate of a format, the dense one where the group has none of it."""
    found = {candidate.format: candidate for candidate in group}
    return found.get(name, found[DENSE])


def formats_of(groups: Iterable[Sequence[Candidate]]) -> list[str]:
    """Return the formats of all groups but the dense one, in the order of the table."""
    names = dict.fromkeys(candidate.format for group in groups for candidate in group)
    return [name for name in names if name != DENSE]


def rules_of(mix: Mix, component: str) -> list[dict[str, Any]]:
    """Return a recipe's rules for one component: one for each format, and a default that leaves the rest dense."""
    layers: dict[str, list[str]] = {}
    backends: dict[str, Mapping[str, Any]] = {}
    for choice in mix.choices:
        if choice.component == component and choice.format != DENSE:
            layers.setdefault(choice.format, []).extend(choice.layers)
            backends[choice.format] = choice.backend
    rules = [{"modules": modules, "backend": dict(backends[name])} for name, modules in layers.items()]
    return [*rules, {"backend": DENSE}]
