"""Run `task=sensitivity`: load the unquantized model, score every format of every group of layers, write the table."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from qexp.config.recipe import format_name
from qexp.errors import ConfigError, first_names
from qexp.experiments.statistics import Metrics, load_statistics, run_peaks
from qexp.loading.component import LoadedComponent
from qexp.loading.components import plan_components
from qexp.loading.lifecycle import load_planned
from qexp.results.environment import versions_of
from qexp.sensitivity.blocks import called_layers
from qexp.sensitivity.groups import ComponentGroups, Group, plan_groups
from qexp.sensitivity.heat_map import draw_heat_map
from qexp.sensitivity.partial import PartialScores, Scores
from qexp.sensitivity.samples import Calibration
from qexp.sensitivity.scorers import SCORERS
from qexp.sensitivity.table import Candidate, Header, SensitivityTable, write_table
from qexp.system.files import write_json
from qexp.system.memory import PeakMemory
from qexp.system.screen import say

if TYPE_CHECKING:
    from torch import nn

    from qexp.loading.component import LoadRequest, PlannedComponent
    from qexp.tasks.context import RunContext

DTYPE = "float32"  # of the networks that are scored: rounded activations bury small differences


def run_sensitivity(context: RunContext) -> Metrics:
    """Score every group; writes plan.json, sensitivity.csv, sensitivity.json and sensitivity.png."""
    started = time.perf_counter()
    context, planned, groups = plan_sensitivity(context)
    write_json(context.folder / "plan.json", {name: one.prepared.plan.to_container() for name, one in planned.items()})
    loaded = _load(context, planned)
    with PeakMemory(context.device) as peak:
        _score(context, groups)
    return {
        **load_statistics(list(loaded.values())),
        "time/total_seconds": time.perf_counter() - started,
        **run_peaks(peak, next(iter(loaded.values())).memory.baseline.total_bytes),
    }


def plan_sensitivity(context: RunContext) -> tuple[RunContext, dict[str, PlannedComponent], dict[str, ComponentGroups]]:
    """Plan what is scored and loaded: (the context with skeletons, plans of loads, groups). No weight is read."""
    config, source = context.config, context.source
    groups = {name: plan_groups(context.requests[name], config.task) for name in source.quantized_components()}
    planned = plan_components(_in_fp32(context, groups))
    context = replace(context, models={name: component.prepared.model for name, component in planned.items()})
    source.check_run(context.models, config.task)
    return context, planned, groups


def _in_fp32(context: RunContext, scored: Mapping[str, ComponentGroups]) -> dict[str, LoadRequest]:
    """Return the requests of the scored components in fp32; with offload=block, their blocks alone travel.

    What is outside of blocks is needed again in the backward pass, with no forward that tells when.
    """
    offload, requests = context.config.offload, dict(context.requests)
    for name, own in scored.items():
        request = replace(requests[name], settings=replace(requests[name].settings, compute_dtype=DTYPE))
        if offload.strategy == "block":
            if not own.block_lists:
                raise ConfigError(f"offload.strategy=block: '{name}' has no lists of blocks; use offload=none")
            places = {"": str(context.device), **dict.fromkeys(own.block_lists, offload.to)}
            request = replace(request, device_map=places)
        requests[name] = request
    return requests


def _load(context: RunContext, planned: Mapping[str, PlannedComponent]) -> dict[str, LoadedComponent]:
    loaded = {}
    for name, component in planned.items():
        loaded[name] = load_planned(component, context.config.loader)
        context.source.adapt(name, context.models[name], component.prepared.compute_dtype)
    return loaded


def _score(context: RunContext, groups: Mapping[str, ComponentGroups]) -> None:
    """Score what is not scored yet, and write the table."""
    scorer = SCORERS[context.task.score](context, groups)
    header = _header(context, groups, scorer.calibration)
    total = sum(len(group.formats) * scorer.passes(name) for name, one in groups.items() for group in one.groups)
    done = PartialScores(context.folder, header.versions, total, anew=context.config.resume == "none")
    candidates, scored = list[Candidate](), dict[str, ComponentGroups]()
    for name, own in groups.items():
        scores = scorer.score(name, own, done)
        own = scored[name] = own.without(
            unreached_groups(name, context.models[name], own, scores, partial(scorer.run, name))
        )
        candidates += [one for group in own.groups for one in _candidates(name, group, own, scores[group.name])]
    if not candidates:
        raise ConfigError("no layer that a format can hold is called for these samples; give other samples")
    fixed = {name: own.fixed_bytes for name, own in scored.items()}
    table = SensitivityTable(replace(header, fixed_bytes=fixed), tuple(candidates))
    draw_heat_map(table, context.folder)
    write_table(context.folder, table)
    done.remove()


def unreached_groups(
    component: str, model: nn.Module, own: ComponentGroups, scores: Mapping[str, Scores], run: Callable[[], object]
) -> list[Group]:
    """Return the groups that no sample reaches, and say so: that they cost nothing would not be true.

    run: has the component answer the samples. A layer may be read without being called; it is reached if a format of
    it costs something.
    """
    silent = [group for group in own.groups if not any(scores[group.name].values())]
    if not silent:
        return []
    called = called_layers(model, [layer for group in silent for layer in group.layers], run)
    unreached = [group for group in silent if not called.intersection(group.layers)]
    if unreached:
        say(
            f"warning: {component}: no sample reaches {first_names([group.name for group in unreached])}: these layers "
            "have no scores, and stay dense in every mix; give more or other samples (task.samples=)"
        )
    return unreached


def _header(context: RunContext, groups: Mapping[str, ComponentGroups], calibration: Calibration) -> Header:
    config = context.config
    methods = sorted({method for one in config.task.formats for method in one.methods()})
    is_full = config.identity == "full"
    return Header(
        checkpoint={name: context.requests[name].checkpoint.content_hash(full=is_full) for name in groups},
        model=config.model.source,
        score=config.task.score,
        error=calibration.error,
        unit=calibration.unit,
        samples=calibration.samples,
        fixed_bytes={name: own.fixed_bytes for name, own in groups.items()},
        base=format_name(config.task.base) if config.task.base is not None else "",
        formats=tuple(dict.fromkeys(name for own in groups.values() for name in own.formats)),
        versions={name: found or "" for name, found in versions_of(("qexp", "torch", *methods)).items()},
    )


def _candidates(component: str, group: Group, own: ComponentGroups, scores: Mapping[str, float]) -> list[Candidate]:
    dense = Candidate(component, group.name, group.layers, "none", {"quant_method": "none"}, group.nbytes["none"], 0.0)
    quantized = [
        Candidate(component, group.name, group.layers, name, _backend(own.formats[name].config), nbytes, scores[name])
        for name, nbytes in group.nbytes.items()
        if name in scores
    ]
    return [dense, *quantized]


def _backend(config: object) -> dict[str, object]:
    from qexp.config.dataclass_io import to_plain

    return {name: value for name, value in to_plain(config).items() if value is not None}
