"""What the proof compares: the best mixes, every uniform format that fits, and a rule that people write by hand."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qexp.fit.layers import ModelLayers
from qexp.fit.mix import Mix, choice_of, formats_of, uniform_mix
from qexp.fit.opened import OpenedModel
from qexp.fit.plan import FitPlan
from qexp.fit.program import Groups, best_mix
from qexp.fit.recipes import backend_overrides, place_overrides
from qexp.sensitivity.table import DENSE, Candidate
from qexp.system.screen import say

SENSITIVE = re.compile(r"embed|modulation|adaln|(^|[._])(norm|mod)\d*([._]|$)")  # names that rules by hand keep
RULE = "rule by hand"
FLOORS = 2  # mixes without the smallest format, and without the two smallest


@dataclass(frozen=True)
class Contestant:
    """A mix under a name. overrides: that load it."""

    name: str
    kind: Literal["mix", "uniform", "rule"]
    mix: Mix
    overrides: tuple[str, ...]


def contestants_of(opened: OpenedModel, plan: FitPlan, mixes: Mapping[str, Mix], folder: Path) -> list[Contestant]:
    """Return all that the proof compares, each within the limits; recipes are written into the folder."""
    named: list[tuple[str, Literal["mix", "uniform", "rule"], Mix]] = [
        (name, "mix", mix) for name, mix in mixes.items()
    ]
    named += [(name, "mix", one) for name, one in careful_mixes(plan, next(iter(mixes.values())))]
    methods = {str(choice.backend["quant_method"]) for mix in mixes.values() for choice in mix.choices} - {DENSE}
    for method in sorted(methods) if len(methods) > 1 else ():  # in files of one kind, which other programs open
        own = [[c for c in group if c.backend["quant_method"] in (method, DENSE)] for group in plan.groups]
        found = best_mix(own, plan.limits)
        named += [(f"mix of {method}", "mix", found)] if found is not None else []
    for name in [*formats_of(plan.groups), DENSE]:
        found = within_limits(plan, [[choice_of(group, name)] for group in plan.groups])
        named += [(name, "uniform", found)] if found is not None else []
    rule = rule_by_hand(plan, plan.model)
    named += [(RULE, "rule", rule)] if rule is not None else []
    if rule is None:
        say(f"left out: {RULE} (first and last layer, embeddings and modulations dense): no format of the others fits")
    return [make_contestant(opened, plan, *one, folder) for one in _distinct(named)]


def careful_mixes(plan: FitPlan, mix: Mix) -> Iterator[tuple[str, Mix]]:
    """Yield mixes without the formats of the fewest bits that a mix has: large errors add up least."""
    bits: dict[str, float] = {}
    for group in plan.groups:
        dense = choice_of(group, DENSE).nbytes
        bits |= {choice.format: choice.nbytes / dense for choice in group if dense and choice.format not in bits}
    used = sorted(mix.formats.keys() & bits.keys() - {DENSE}, key=lambda name: (bits[name], name))
    for least in used[:FLOORS]:
        kept = [[c for c in group if c.format == DENSE or bits.get(c.format, 0) > bits[least]] for group in plan.groups]
        found = best_mix(kept, plan.limits)
        if found is not None:
            yield f"mix above {least}", found


def make_contestant(
    opened: OpenedModel, plan: FitPlan, name: str, kind: Literal["mix", "uniform", "rule"], mix: Mix, folder: Path
) -> Contestant:
    """Write the recipe of a mix, and return what loads it."""
    file = re.sub(r"\W+", "_", name)
    words = backend_overrides(mix, plan.model, folder / "recipes", file)
    places = place_overrides(mix, opened.config.device, len(opened.config.components) > 1)
    return Contestant(name, kind, mix, (*words, *places))


def recommended_overrides(opened: OpenedModel, plan: FitPlan, mix: Mix, folder: Path) -> list[str]:
    """Write the recipe of the answer, in the place of an earlier one, and return what loads it."""
    for earlier in folder.glob("recipe*.yaml"):
        earlier.unlink()
    words = backend_overrides(mix, plan.model, folder, "recipe")
    return [*words, *place_overrides(mix, opened.config.device, len(opened.config.components) > 1)]


def within_limits(plan: FitPlan, groups: Groups) -> Mix | None:
    """Return the groups, of one candidate each, at the places that keep the limits; None if there are none."""
    mix = Mix(tuple(group[0] for group in groups))
    if plan.limits.travel_bytes is not None:
        return best_mix(groups, plan.limits)
    return mix if plan.limits.device_bytes_of(mix) <= plan.limits.device_bytes else None


def rule_by_hand(plan: FitPlan, model: ModelLayers) -> Mix | None:
    """First and last layer, embeddings and modulations dense, the others in the largest format that fits."""
    kept = {
        (component, layer)
        for component, layers in model.components.items()
        for layer in layers.order
        if layer in (layers.order[0], layers.order[-1]) or SENSITIVE.search(layer.lower())
    }
    for name in sorted(formats_of(plan.groups), key=lambda name: -uniform_mix(plan.groups, name).nbytes):
        chosen = [[_by_rule(group, name, kept)] for group in plan.groups]
        if (found := within_limits(plan, chosen)) is not None:
            return found
    return None


def _by_rule(group: Sequence[Candidate], name: str, kept: set[tuple[str, str]]) -> Candidate:
    is_kept = any((group[0].component, layer) in kept for layer in group[0].layers)
    return choice_of(group, DENSE if is_kept else name)


def _distinct(
    named: Sequence[tuple[str, Literal["mix", "uniform", "rule"], Mix]],
) -> list[tuple[str, Literal["mix", "uniform", "rule"], Mix]]:
    """Return each assignment once, under the name of a uniform format where it is one."""
    found: dict[object, tuple[str, Literal["mix", "uniform", "rule"], Mix]] = {}
    for one in named:
        key = tuple(choice.format for choice in one[2].choices), one[2].away
        if key not in found or (one[1] == "uniform" and found[key][1] != "uniform"):
            found[key] = one
    return list(found.values())
