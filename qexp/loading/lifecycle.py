"""The quantize-on-load lifecycle: from a checkpoint on disk to a quantized model, one weight at a time.

The nine stages stand in order in `load_stages`, which pauses once: all components of a pipeline are planned before a
weight of one is read. The full-precision model is never in memory: the skeleton has no data, and each dense weight
exists only until it is quantized.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qexp.checkpoints.checkpoint import open_component
from qexp.loading.audit import audit
from qexp.loading.component import LoadedComponent, PlannedComponent, Prepared
from qexp.loading.device_map import DeviceMap, main_device, no_split_classes, place, to_keep_in_fp32
from qexp.loading.fp32 import compute_in_fp32
from qexp.loading.prepare import (
    check_environment,
    choose_dtypes,
    plan_modules,
    prepare,
    resolve_quantizer,
    skeleton_and_names,
)
from qexp.loading.quantized_model import register
from qexp.loading.weights import load_weights
from qexp.offloading.dispatch import Dispatch
from qexp.system.device_names import MaxMemory
from qexp.system.memory import PeakMemory, without_collector

if TYPE_CHECKING:
    from qexp.config.schema import ComponentConfig, LoaderConfig
    from qexp.models.base import ModelSource


def load_stages(
    source: ModelSource,
    component: str,
    settings: ComponentConfig,
    *,
    device: torch.device,
    device_map: DeviceMap = None,
    max_memory: MaxMemory = None,
    store: Path | None = None,
) -> Generator[PlannedComponent, LoaderConfig, LoadedComponent]:
    """Load one component of a model in nine stages.

    store: the folder for what goes to disk. Yields once: the plan, before a weight is read; the caller looks at
    `prepared.unmatched`. Is sent: how to read. Returns: the loaded component.
    """
    with without_collector():
        checkpoint = open_component(source, component)  # 1 read config.json, and headers
        backend = settings.backend.resolved(main_device(device_map, device).type)
        quantizer = resolve_quantizer(backend, checkpoint, component)  # 2 the checkpoint's config wins over the user's
        device_map = quantizer.update_device_map(device_map)
        device = main_device(device_map, device)
        check_environment(quantizer, checkpoint, device)  # 3 hardware, library versions
        dtypes = choose_dtypes(settings, checkpoint, quantizer)  # 4 compute dtype
        # 5 build the network on the meta device
        model, named = skeleton_and_names(source, component, checkpoint, compute_dtype=dtypes[0])
        prepared = plan_modules(source, component, settings, named, quantizer, model, *dtypes)  # 6 swap modules, plan
        blocks = source.block_lists(model) if device_map is not None else ()
        no_split = no_split_classes(model, blocks)
        placement = place(model, prepared.plan, device_map, device, max_memory, no_split)
        if spilled := to_keep_in_fp32(model, quantizer, placement):  # stays dense there: plan again, in the same places
            settings = _kept_dense(settings, spilled)
            prepared = prepare(source, component, settings, checkpoint, quantizer, device=device)
            model, places = prepared.model, placement.places
            placement = place(model, prepared.plan, places, device, max_memory, no_split, travels=False)
        prepared = replace(prepared, plan=prepared.plan.placed(placement.device_of))
    loader = yield PlannedComponent(prepared, placement)
    dispatch = Dispatch(model, placement, no_split, store) if placement.is_spread else None
    warm_up(prepared, device)
    started = time.perf_counter()
    with PeakMemory(device) as memory:
        load_weights(prepared, component, placement, dispatch, loader)  # 7 stream, quantize, assign
        quantizer.postprocess_model(model, device)  # 8 finish; the audit below belongs to it, but not to the time taken
        compute_in_fp32(model, settings.keep_in_fp32_modules, prepared.compute_dtype)
        register(model, prepared)  # 9 mark the model as quantized
        if dispatch is not None:
            dispatch.start()
    seconds = time.perf_counter() - started
    audit(model, quantizer, prepared.plan.quantized_nbytes)
    if device_map is not None:
        model.hf_device_map = placement.hf_device_map()  # type: ignore[assignment]
    return LoadedComponent(model, prepared.plan, seconds, memory, placement, prepared.compute_dtype, dispatch)


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
) -> LoadedComponent:
    """Load one component of a model, quantized as `settings` say, onto `device`, or where `device_map` puts it.

    max_memory: bytes, or sizes such as "10GiB", for each device, "cpu" and "disk"; offload_folder: for what a map puts
    on disk.
    Raises: ConfigError, MissingLibraryError, UnsupportedError or LoadError, most of them before a weight is read.
    """
    planned = plan_component(
        source, component, settings, device=device, device_map=device_map, max_memory=max_memory, store=offload_folder
    )
    planned.prepared.check_patterns()
    return load_planned(planned, loader)


def plan_component(
    source: ModelSource,
    component: str,
    settings: ComponentConfig,
    *,
    device: torch.device,
    device_map: DeviceMap = None,
    max_memory: MaxMemory = None,
    store: Path | None = None,
) -> PlannedComponent:
    """Run stages 1 to 6 of `load_stages`: no weight is read. The caller looks at `prepared.unmatched`."""
    stages = load_stages(
        source, component, settings, device=device, device_map=device_map, max_memory=max_memory, store=store
    )
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
    """Settings that neither quantize these modules nor cast them."""
    return replace(
        settings,
        skip_modules=(*settings.skip_modules, *names),
        keep_in_fp32_modules=(*settings.keep_in_fp32_modules, *names),
    )


def warm_up(prepared: Prepared, device: torch.device) -> None:
    """Quantize a small weight in each format, so that libraries and thread pools are there before memory and time are
    measured."""
    if prepared.quantizer.stored:
        return
    chosen = sorted((spec for spec in prepared.chosen.values() if spec.numel), key=lambda spec: spec.shape[1])
    by_format = {prepared.quantizer.format_key(spec): spec for spec in chosen}
    for found in by_format.values():  # the widest: a format may hold other narrow weights than one with 64 rows
        spec = replace(found, shape=(64, found.shape[1]))
        with torch.no_grad():
            prepared.quantizer.create_quantized_param(spec, [torch.ones(spec.shape)], {}, device)
