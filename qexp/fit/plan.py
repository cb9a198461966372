"""The plan of a fit: layers, groups with scores, and the mix that the program chooses. No weight is read."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from qexp.errors import ConfigError
from qexp.fit.budget import Size, limits_of, refuse_budget, size_of
from qexp.fit.candidates import formats_in, scored_groups
from qexp.fit.layers import ModelLayers, plan_layers
from qexp.fit.mix import Mix, rules_of
from qexp.fit.opened import OpenedModel
from qexp.fit.program import Groups, Limits, best_mix, smallest_bytes
from qexp.fit.recipes import config_of
from qexp.fit.request import Request
from qexp.loading.forecast import bytes_by_site
from qexp.loading.lifecycle import plan_component, request_load
from qexp.quantizers.configs import BackendConfig
from qexp.sensitivity.table import DENSE, SensitivityTable, check_checkpoint, read_table
from qexp.system.screen import say


@dataclass(frozen=True)
class FitPlan:
    """groups: the candidates of each; limits: of the program; table, place: the scores, and where they are; bandwidth:
    bytes a second that travel, None where nothing does; compute_ms: of a step in which nothing does, as measured."""

    model: ModelLayers
    groups: Groups
    size: Size
    limits: Limits
    table: SensitivityTable
    place: Path
    bandwidth: float | None = None
    compute_ms: float = 0.0


def check_bounds(opened: OpenedModel, request: Request, formats: Mapping[str, BackendConfig]) -> ModelLayers:
    """Plan the candidates without scores. Raises: ConfigError for a budget that not even the smallest formats meet."""
    model = plan_layers(opened.source, opened.config, opened.chosen, formats, hashed=not opened.is_published)
    groups = model.unscored()
    _check_budget(request, size_of(model, groups, request), groups)
    return model


def plan_fit(opened: OpenedModel, request: Request, place: Path, bandwidth: float | None) -> FitPlan:
    """Read the scores in a folder and plan the model with them.

    Raises: ConfigError for scores of another model, formats that have none, or a budget that nothing meets.
    """
    table = read_table(place)
    formats = formats_in(table, request.formats, place)
    model = plan_layers(opened.source, opened.config, opened.chosen, formats, hashed=not opened.is_published)
    if opened.is_published:
        say(f"{opened.name}: only its published shape is here: nothing says whether the scores are of its weights")
    else:
        check_checkpoint(table, place, model.checkpoints)
    groups = scored_groups(table, model, place)
    size = size_of(model, groups, request)
    _check_budget(request, size, groups)
    return FitPlan(model, groups, size, limits_of(request, size, bandwidth), table, place, bandwidth)


def within(plan: FitPlan, request: Request, compute_ms: float | None = None) -> FitPlan:
    """Return the plan with the limits of a request. compute_ms: see `FitPlan`; None: as it was.

    Raises: ConfigError for a budget that nothing meets.
    """
    milliseconds = plan.compute_ms if compute_ms is None else compute_ms
    size = size_of(plan.model, plan.groups, request)
    _check_budget(request, size, plan.groups)
    limits = limits_of(request, size, plan.bandwidth, milliseconds)
    return replace(plan, size=size, limits=limits, compute_ms=milliseconds)


def _check_budget(request: Request, size: Size, groups: Groups) -> None:
    """Raise ConfigError where the smallest formats of all groups, all on the device, are too large.

    With places the program itself says whether there is a mix.
    """
    bounds = request if request.step_ms is None else replace(request, memory=None)
    if smallest_bytes(groups) > limits_of(replace(bounds, step_ms=None), size).device_bytes:
        raise refuse_budget(request, size, groups)


def choose_mix(plan: FitPlan, request: Request) -> Mix:
    """Return the mix with the lowest predicted error within the limits. Raises: ConfigError if nothing keeps them."""
    mix = best_mix(plan.groups, plan.limits)
    if mix is None:
        raise refuse_budget(request, plan.size, plan.groups, _with_travel(plan))
    return mix


def _with_travel(plan: FitPlan) -> str:
    travel = plan.limits.travel_bytes
    return "" if travel is None else f" ({travel / (1 << 20):.0f} MiB may travel in a step)"


def timed_choice(plan: FitPlan, request: Request) -> tuple[Mix, float]:
    """(the mix, milliseconds that the program took)."""
    started = time.perf_counter()
    mix = choose_mix(plan, request)
    return mix, 1000 * (time.perf_counter() - started)


def check_recipe(opened: OpenedModel, plan: FitPlan, mix: Mix) -> None:
    """Plan the chosen components with the mix's recipe, as a load does.

    Raises: ConfigError where that takes other bytes than the candidates add up to.
    """
    found = plan.model.other_bytes
    for name in opened.chosen:
        rules = rules_of(mix, name)
        fields = {"quant_method": "mixed", "recipe": rules} if len(rules) > 1 else {"quant_method": DENSE}
        settings = replace(opened.config.components[name], backend=config_of(fields, "the mix"))
        request = request_load(opened.source, name, settings, device=torch.device(opened.config.device))
        found += sum(bytes_by_site(plan_component(request).prepared).values())
    if found != plan.size.fixed + mix.nbytes:
        raise ConfigError(
            f"a load of the mix takes {found} bytes, and its layers add up to {plan.size.fixed + mix.nbytes}; please "
            "report this, with the model and the formats"
        )
