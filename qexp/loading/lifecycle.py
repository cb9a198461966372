"""The quantize-on-load lifecycle: from a checkpoint on disk to a quantized model, one weight at a time.

The nine stages stand in order in `load_stages`, which pauses once: all components of a pipeline are planned before a
weight of one is read. The full-precision model is never in memory: the skeleton has no data, and each dense weight
exists only until it is quantized.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qexp.checkpoints.checkpoint import open_component
from qexp.loading.audit import audit
from qexp.loading.component import LoadedComponent, LoadRequest, LoadTimes, PlannedComponent, Prepared
from qexp.loading.device_map import DeviceMap, main_device, no_split_classes, place, to_keep_in_fp32
from qexp.loading.fp32 import compute_in_fp32
from qexp.loading.mapping import choose_mapped
from qexp.loading.prepare import load_quantizer_of, prepare
from qexp.loading.quantized_model import register
from qexp.loading.weights import load_weights
from qexp.models.component_settings import merge_with_checkpoint
from qexp.offloading.dispatch import Dispatch
from qexp.quantizers.cpu_kernels.readiness import prepare_beside
from qexp.system.device_names import MaxMemory
from qexp.system.memory import PeakMemory, without_collector

if TYPE_CHECKING:
    from qexp.config.schema import ComponentConfig, LoaderConfig
    from qexp.models.base import ModelSource


def request_load(
    source: ModelSource,
    component: str,
    settings: ComponentConfig,
    *,
    device: torch.device,
    device_map: DeviceMap = None,
    max_memory: MaxMemory = None,
    store: Path | None = None,
    waits_for_kernels: bool = True,
) -> LoadRequest:
    """Open the checkpoint of a component and merge its settings with it: the one place that does both for a load.

    See `LoadRequest`. Raises: LoadError.
    """
    started = time.perf_counter()
    checkpoint = open_component(source, component)
    kind = main_device(device_map, device).type  # torchao's int4 is another backend on a CPU, for example
    settings = merge_with_checkpoint(settings, checkpoint, component, kind)
    seconds = time.perf_counter() - started
    place = (device, device_map, max_memory, store)
    return LoadRequest(source, component, checkpoint, settings, *place, waits_for_kernels, seconds)


def load_stages(request: LoadRequest) -> Generator[PlannedComponent, LoaderConfig, LoadedComponent]:
    """Load one component of a model in nine stages; the first, its config.json and headers, is done.

    Yields once: the plan, before a weight is read; the caller looks at `prepared.unmatched`. Is sent: how to read.
    Returns: the loaded component.
    """
    started = time.perf_counter()
    with without_collector():
        quantizer = load_quantizer_of(request)  # 2
        device_map = quantizer.update_device_map(request.device_map)
        device = main_device(device_map, request.device)
        request = replace(request, device=device, device_map=device_map)
        prepared = prepare(request, quantizer)  # 3 to 6: machine, dtypes, skeleton, plan
        model = prepared.model
        # without a map everything is in one place, and nothing can be split
        no_split = no_split_classes(model, request.source.block_lists(model) if device_map is not None else ())
        placement = place(model, prepared.plan, device_map, device, request.max_memory, no_split)
        if spilled := to_keep_in_fp32(model, quantizer, placement):  # stays dense there: plan again, in the same places
            request = replace(request, settings=_kept_dense(request.settings, spilled))
            prepared = prepare(request, quantizer)
            model, places = prepared.model, placement.places
            placement = place(model, prepared.plan, places, device, request.max_memory, no_split, travels=False)
        prepared = replace(prepared, plan=prepared.plan.placed(placement.device_of))
    plan_seconds = request.open_seconds + time.perf_counter() - started
    loader = yield PlannedComponent(prepared, placement)
    started = time.perf_counter()
    dispatch = Dispatch(model, placement, no_split, request.store) if placement.is_spread else None
    if dispatch is None:  # what travels is packed together, so that it is copied in any case
        plan = choose_mapped(prepared.plan, quantizer, loader.map, request.component)
        prepared = replace(prepared, plan=plan)
    planned = PlannedComponent(prepared, placement)
    if request.waits_for_kernels or device.type != "cpu" or quantizer.stored:
        warm_up(prepared, device)  # before memory is measured: what libraries take is not the model's
    else:
        prepare_beside(partial(warm_up, prepared, device))
    warm = time.perf_counter()
    with PeakMemory(device) as memory:
        load_weights(planned, dispatch, loader)  # 7 stream, quantize, assign
        quantizer.postprocess_model(model, device)  # 8 finish; the audit below belongs to it
        compute_in_fp32(model, request.settings.keep_in_fp32_modules, prepared.compute_dtype)
        register(model, prepared)  # 9 mark the model as quantized
        if dispatch is not None:
            dispatch.start()
    audit(model, quantizer, prepared.plan.quantized_nbytes)
    if device_map is not None:
        model.hf_device_map = placement.hf_device_map()  # type: ignore[assignment]
    times = LoadTimes(plan_seconds, warm - started, time.perf_counter() - warm)
    return LoadedComponent(model, prepared.plan, times, memory, placement, prepared.compute_dtype, dispatch)


def load_component(
    source: ModelSource,
    component: str,
    settings: ComponentConfig,
    *,
    device: torch.device,
    loader: LoaderConfig,
    device_map: DeviceMap = None,
    max_memory: MaxMemory = None,
    offload_folder: Path | None = None,
    waits_for_kernels: bool = True,
) -> LoadedComponent:
    """Load one component of a model, quantized as `settings` say, onto `device`, or where `device_map` puts it.

    max_memory, offload_folder, waits_for_kernels: see `LoadRequest`, whose `store` is that folder.
    Raises: ConfigError, MissingLibraryError, UnsupportedError or LoadError, most of them before a weight is read.
    """
    request = request_load(
        source,
        component,
        settings,
        device=device,
        device_map=device_map,
        max_memory=max_memory,
        store=offload_folder,
        waits_for_kernels=waits_for_kernels,
    )
    planned = plan_component(request)
    planned.prepared.check_patterns()
    return load_planned(planned, loader)


def plan_component(request: LoadRequest) -> PlannedComponent:
    """Run stages 2 to 6 of `load_stages`: no weight is read. The caller looks at `prepared.unmatched`."""
    stages = load_stages(request)
    return replace(next(stages), rest=stages)


def load_planned(planned: PlannedComponent, loader: LoaderConfig) -> LoadedComponent:
    """Run stages 7 to 9 of a component that `plan_component` planned: its weights are read. Works once."""
    assert planned.rest is not None
    try:
        planned.rest.send(loader)
    except StopIteration as done:
        loaded: LoadedComponent = done.value
        return loaded
    raise AssertionError("a load pauses once")


def _kept_dense(settings: ComponentConfig, names: list[str]) -> ComponentConfig:
    """Return settings that neither quantize these modules nor cast them."""
    return replace(
        settings,
        skip_modules=(*settings.skip_modules, *names),
        keep_in_fp32_modules=(*settings.keep_in_fp32_modules, *names),
    )


def warm_up(prepared: Prepared, device: torch.device) -> None:
    """Quantize a small weight in each format, so that libraries and loops are there before memory is measured."""
    if prepared.quantizer.stored:
        return
    chosen = sorted((spec for spec in prepared.chosen.values() if spec.numel), key=lambda spec: spec.shape[1])
    by_format = {prepared.quantizer.format_key(spec): spec for spec in chosen}
    for found in by_format.values():  # the widest: a format may hold other narrow weights than one with 64 rows
        spec = replace(found, shape=(64, found.shape[1]))
        with torch.no_grad():
            prepared.quantizer.create_quantized_param(spec, [torch.ones(spec.shape)], {}, device)
