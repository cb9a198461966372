"""The front: the best mix at each of many budgets, beside the uniform formats."""

from __future__ import annotations

from dataclasses import dataclass

from qexp.fit.budget import Size, budgets_between
from qexp.fit.mix import Mix, formats_of, uniform_mix
from qexp.fit.program import Groups, Limits, best_mix, smallest_bytes
from qexp.sensitivity.table import DENSE

BUDGETS = 20


@dataclass(frozen=True)
class FrontPoint:
    """A mix under a name: "mix", or that of the format of all layers."""

    name: str
    mix: Mix
    weights_bytes: int  # of the whole model
    bits: float  # of a weight of the groups

    @property
    def is_uniform(self) -> bool:
        return self.name != "mix"


def mixed_front(groups: Groups, size: Size, count: int = BUDGETS) -> list[FrontPoint]:
    """Return the best mix at `count` budgets from the smallest mix to the dense model, each once."""
    most = sum(max(candidate.nbytes for candidate in group) for group in groups)
    found: dict[int, FrontPoint] = {}
    for budget in budgets_between(smallest_bytes(groups), most, count):
        mix = best_mix(groups, Limits(budget))
        if mix is not None:
            found[mix.nbytes] = point("mix", mix, size)
    return [found[nbytes] for nbytes in sorted(found)]


def uniform_points(groups: Groups, size: Size) -> list[FrontPoint]:
    """Return every format for all layers, and the dense model, by bytes."""
    points = [point(name, uniform_mix(groups, name), size) for name in [*formats_of(groups), DENSE]]
    return sorted(points, key=lambda one: one.weights_bytes)


def point(name: str, mix: Mix, size: Size) -> FrontPoint:
    return FrontPoint(name, mix, size.fixed + mix.nbytes, size.bits(mix.nbytes))
