"""What the weights of a planned model take: bytes of each component, and of each way to offload them.

Everything comes from the loading plan (exact bytes of what a load will hold) and from the grouping that offloading
itself uses. No weight is read, and activations are not included.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from qexp.config.offload import STRATEGIES, OffloadConfig
from qexp.config.schema import RunConfig
from qexp.errors import ConfigError, QexpError
from qexp.loading.component import Prepared
from qexp.loading.components import check_shared_patterns
from qexp.loading.lifecycle import plan_component, request_load
from qexp.models.base import ModelSource
from qexp.offloading.grouping import plan_groups
from qexp.offloading.payload import sites, true_nbytes
from qexp.offloading.residency import choose_resident

LOADING_BYTES = 128 << 20  # what a load may take beside its result and its largest dense tensor
OFFLOADED = tuple(strategy for strategy in STRATEGIES if strategy != "none")


@dataclass(frozen=True)
class ComponentForecast:
    """Bytes of one component.

    parameters: numbers, each counted once; file_bytes: of what is read; result_bytes: of the loaded weights, and of
    what the network computes itself (position tables); largest_bytes: the largest tensor before it is quantized;
    groups: strategy -> bytes of each group that travels; waits: calibrated, resident, after all components are loaded;
    quantized: its layers; skipped: layer -> why not; problems: strategy -> why it cannot be used.
    """

    parameters: int
    file_bytes: int
    result_bytes: int
    largest_bytes: int
    groups: Mapping[str, Sequence[int]]
    waits: bool
    quantized: tuple[str, ...]
    skipped: Mapping[str, str]
    problems: Mapping[str, str]

    @property
    def loading_bytes(self) -> int:
        """The most that a load may take."""
        return self.result_bytes + self.largest_bytes + LOADING_BYTES


@dataclass(frozen=True)
class OffloadForecast:
    """Bytes under one strategy. device: at most, while the model runs; loading: at most, while it is loaded; host: what
    rests in host memory; problem: why the strategy cannot be used, '' if it can."""

    device: int = 0
    loading: int = 0
    host: int = 0
    problem: str = ""

    def fits(self, memory: int) -> bool:
        return not self.problem and max(self.device, self.loading) <= memory


def forecast_components(
    source: ModelSource, config: RunConfig, offload: OffloadConfig
) -> tuple[dict[str, ComponentForecast], dict[str, QexpError]]:
    """Plan every component: (forecasts, the errors of those that cannot be planned).

    offload: its fields apart from the strategy, for groups. Raises: ConfigError for a pattern that matches nothing.
    """
    found, failed = dict[str, ComponentForecast](), dict[str, QexpError]()
    prepared: dict[str, Prepared] = {}
    for name, settings in config.components.items():
        try:
            request = request_load(source, name, settings, device=torch.device(config.device))
            prepared[name] = plan_component(request).prepared
        except QexpError as error:
            failed[name] = error
            continue
        found[name] = _forecast(prepared[name], offload, source.block_lists(prepared[name].model))
    if not failed:
        check_shared_patterns(prepared, config.components)
    return found, failed


def _forecast(prepared: Prepared, offload: OffloadConfig, block_lists: Sequence[str]) -> ComponentForecast:
    plan, known = prepared.plan, bytes_by_site(prepared)
    groups, problems = dict[str, Sequence[int]](), dict[str, str]()
    for strategy in OFFLOADED:
        try:
            groups[strategy] = _travelling(prepared.model, known, replace(offload, strategy=strategy), block_lists)
        except ConfigError as error:
            problems[strategy] = str(error)
    return ComponentForecast(
        sum(item.numel for item in plan.distinct),
        sum(item.nbytes for item in plan.distinct),
        sum(known.values()),
        max((item.dense_nbytes for item in plan.items), default=0),
        groups,
        prepared.quantizer.requires_calibration,
        tuple(plan.quantized_nbytes),
        plan.skipped,
        problems,
    )


def _travelling(
    model: nn.Module, known: Mapping[int, int], offload: OffloadConfig, block_lists: Sequence[str]
) -> list[int]:
    """Return the bytes of each group that travels, as offloading forms them, without the padding of leaves."""
    config = replace(offload, to="cpu").resolved("cuda")  # where a device has memory of its own
    sizes, counted = [], set[int]()
    for group in plan_groups(model, config, block_lists):
        own = [id(store[name]) for store, name in group.all_sites]
        sizes.append(sum(known[value] for value in dict.fromkeys(own) if value not in counted))
        counted.update(own)
    if not config.resident_gib:
        return sizes
    outside = sum(known.values()) - sum(sizes)
    staying = choose_resident(sizes, round(config.resident_gib * (1 << 30)) - outside)
    return [size for number, size in enumerate(sizes) if number not in staying]


def bytes_by_site(prepared: Prepared) -> dict[int, int]:
    """Identity of each value on the skeleton -> bytes that it will have; what is tied has them once."""
    planned = {item.target: item.result_nbytes for item in prepared.plan.items}
    found, counted = dict[int, int](), set[str]()
    for module_name, module in prepared.model.named_modules():
        for store, name in sites(module):
            target = f"{module_name}.{name}".lstrip(".")
            if prepared.plan.tied.get(target, target) in counted:
                found.setdefault(id(store[name]), 0)
                continue
            counted.add(prepared.plan.tied.get(target, target))
            found[id(store[name])] = planned[target] if target in planned else true_nbytes(store[name])
    return found


def forecast_offload(
    parts: Sequence[ComponentForecast], offload: OffloadConfig, dense: Sequence[bool]
) -> Iterator[tuple[str, OffloadForecast]]:
    """Yield the strategies, from the fastest to the one that needs least.

    dense: whether a component is not quantized.
    """
    total = sum(part.result_bytes for part in parts)
    largest = max((part.largest_bytes for part in parts), default=0)
    yield "none", OffloadForecast(total, total + largest + LOADING_BYTES)
    for strategy in ("model", "block", "leaf", "sequential"):
        if problems := [part.problems[strategy] for part in parts if strategy in part.problems]:
            yield strategy, OffloadForecast(problem=problems[0])
            continue
        slots = offload.prefetch_depth if strategy in ("block", "leaf") and offload.use_stream is not False else 1
        yield strategy, _offloaded([(part, part.groups[strategy]) for part in parts], slots, strategy, dense)


def _offloaded(
    parts: Sequence[tuple[ComponentForecast, Sequence[int]]], slots: int, strategy: str, dense: Sequence[bool]
) -> OffloadForecast:
    """Components are loaded one after the other; each is offloaded before the next one comes, unless it waits."""
    host = sum(sum(groups) for _, groups in parts)
    stays = [part.result_bytes - sum(groups) for part, groups in parts]
    rings = [min(slots, len(groups)) * max(groups, default=0) for _, groups in parts]
    # whole components take turns on the device; the slots of other strategies stay there
    running = sum(stays) + (max(rings, default=0) if strategy == "model" else sum(rings))
    loading, before = 0, 0
    for (part, _), stay, ring, is_dense in zip(parts, stays, rings, dense, strict=True):
        # what is not quantized is loaded to host memory if it is to travel
        loading = max(loading, before + (0 if is_dense else part.loading_bytes))
        before += part.result_bytes if part.waits else stay + (0 if strategy == "model" else ring)
    return OffloadForecast(running, max(loading, before), host)
