"""The quantize-on-load lifecycle: from a checkpoint on disk to a quantized model, one weight at a time.

The nine stages stand in order in `load_component`. The full-precision model is never in memory: the skeleton has no
data, and each dense weight exists only until it is quantized.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qexp.checkpoints.checkpoint import open_component
from qexp.loading.audit import audit
from qexp.loading.component import LoadedComponent, PlannedComponent, Prepared
from qexp.loading.device_map import DeviceMap, main_device, no_split_classes, place, to_keep_in_fp32
from qexp.loading.fp32 import compute_in_fp32
from qexp.loading.prepare import prepare, resolve_quantizer
from qexp.loading.quantized_model import register
from qexp.loading.weights import load_weights
from qexp.offloading.dispatch import Dispatch
from qexp.system.device_names import MaxMemory
from qexp.system.memory import PeakMemory, without_collector

if TYPE_CHECKING:
    from qexp.config.schema import ComponentConfig, LoaderConfig
    from qexp.models.base import ModelSource


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


@without_collector()
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
    """Stages 1 to 6 of `load_component`, and where everything goes: no weight is read.

    The caller looks at `prepared.unmatched`. store: the folder for what goes to disk.
    """
    checkpoint = open_component(source, component)  # 1 config
    kind = main_device(device_map, device).type
    quantizer = resolve_quantizer(settings.backend.resolved(kind), checkpoint, component)  # 2 resolve, merge
    device_map = quantizer.update_device_map(device_map)
    device = main_device(device_map, device)
    prepared = prepare(source, component, settings, checkpoint, quantizer, device=device)  # 3 to 6
    blocks = source.block_lists(component) if device_map is not None else ()
    no_split = no_split_classes(prepared.model, blocks)
    placement = place(prepared.model, prepared.plan, device_map, device, max_memory, no_split)
    if spilled := to_keep_in_fp32(prepared.model, quantizer, placement):
        settings = replace(
            settings,
            skip_modules=(*settings.skip_modules, *spilled),
            keep_in_fp32_modules=(*settings.keep_in_fp32_modules, *spilled),
        )
        prepared = prepare(source, component, settings, checkpoint, quantizer, device=device)
        places = placement.places
        placement = place(prepared.model, prepared.plan, places, device, max_memory, no_split, travels=False)
    return PlannedComponent(component, settings, prepared, device, placement, no_split, store, device_map is not None)


def load_planned(planned: PlannedComponent, loader: LoaderConfig) -> LoadedComponent:
    """Stages 7 to 9: read the weights of a component that is planned."""
    prepared, placement, quantizer = planned.prepared, planned.placement, planned.prepared.quantizer
    device, dispatch = planned.device, None
    if placement.is_spread:
        dispatch = Dispatch(prepared.model, placement, planned.no_split, planned.offload_folder)
    warm_up(prepared, device)
    started = time.perf_counter()
    with PeakMemory(device) as memory:
        load_weights(prepared, planned.name, placement, dispatch, loader)  # 7 stream, quantize, assign
        quantizer.postprocess_model(prepared.model, device)  # 8 finish, audit
        compute_in_fp32(prepared.model, planned.settings.keep_in_fp32_modules, prepared.compute_dtype)
        path, carried = prepared.path, prepared.carried_files
        register(prepared.model, quantizer, prepared.config, path, prepared.compute_dtype, carried)  # 9
        if dispatch is not None:
            dispatch.start()
    seconds = time.perf_counter() - started
    audit(prepared.model, quantizer, prepared.plan.quantized_nbytes)
    if planned.has_map:
        prepared.model.hf_device_map = placement.hf_device_map()  # type: ignore[assignment]
    return LoadedComponent(prepared.model, prepared.plan, seconds, memory, placement, prepared.compute_dtype, dispatch)


def warm_up(prepared: Prepared, device: torch.device) -> None:
    """Quantize a small weight, so that libraries and thread pools are there before memory and time are measured."""
    first = next(iter(prepared.chosen.values()), None)  # of a width that the format can hold
    if first is None or first.numel == 0 or prepared.quantizer.stored:
        return
    spec = replace(first, shape=(64, first.shape[1]))
    with torch.no_grad():
        prepared.quantizer.create_quantized_param(spec, [torch.ones(spec.shape)], {}, device)
