"""The quantize-on-load lifecycle: from a checkpoint on disk to a quantized model, one weight at a time.

The nine stages stand in order in `load_stages`, which pauses once: all components of a pipeline are planned before a
weight of one is read. The full-precision model is never in memory: the skeleton has no data, and each dense weight
exists only until it is quantized.
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Mapping
from dataclasses import asdict, replace
from typing import Unpack

import torch

from qexp.checkpoints.checkpoint import open_component
from qexp.checkpoints.regular_file import read_ahead
from qexp.config.schema import ComponentConfig, LoaderConfig
from qexp.errors import LoadError
from qexp.loading.audit import audit
from qexp.loading.component import LoadedComponent, LoadOptions, LoadRequest, LoadTimes, PlannedComponent, Prepared
from qexp.loading.device_map import main_device, no_split_classes, place, to_keep_in_fp32
from qexp.loading.fp32 import compute_in_fp32
from qexp.loading.mapping import choose_mapped
from qexp.loading.prepare import load_quantizer_of, prepare
from qexp.loading.quantized_cache import CachedWeights, QuantizedCache
from qexp.loading.quantized_model import register
from qexp.loading.weights import load_weights
from qexp.models.base import ModelSource
from qexp.models.component_settings import merge_with_checkpoint
from qexp.offloading.dispatch import Dispatch
from qexp.system.child_process import die_with_parent
from qexp.system.memory import PeakMemory, without_collector
from qexp.system.screen import say


def request_load(
    source: ModelSource,
    component: str,
    settings: ComponentConfig,
    *,
    device: torch.device,
    **options: Unpack[LoadOptions],
) -> LoadRequest:
    """Open the checkpoint of a component and merge its settings with it: the one place that does both for a load.

    See `LoadRequest`. Raises: LoadError.
    """
    started = time.perf_counter()
    checkpoint = open_component(source, component)
    kind = main_device(options.get("device_map"), device).type  # torchao's int4 is another backend on a CPU
    settings = merge_with_checkpoint(settings, checkpoint, component, kind)
    seconds = time.perf_counter() - started
    return LoadRequest(source, component, checkpoint, settings, device, open_seconds=seconds, **options)


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
            settings = request.settings
            skipped, in_fp32 = settings.skip_modules, settings.keep_in_fp32_modules
            kept = replace(settings, skip_modules=(*skipped, *spilled), keep_in_fp32_modules=(*in_fp32, *spilled))
            request = replace(request, settings=kept)
            prepared = prepare(request, quantizer)
            model, places = prepared.model, placement.places
            placement = place(model, prepared.plan, places, device, request.max_memory, no_split, travels=False)
        prepared = replace(prepared, plan=prepared.plan.placed(placement.device_of))
    plan_seconds = request.open_seconds + time.perf_counter() - started
    planned = PlannedComponent(prepared, placement)
    loader = yield planned
    dispatch = Dispatch(model, placement, no_split, request.store) if placement.is_spread else None
    if dispatch is None:  # what travels is packed together, so that it is copied in any case
        planned = _with_mapping(planned, loader)
        prepared = planned.prepared
    cache = QuantizedCache(request.cache) if request.cache is not None and dispatch is None else None
    cached = cache.find(prepared) if cache is not None else None
    is_new = cached is None
    if is_new and cache is not None and cache.in_child and cache.can_hold(prepared):
        _quantize_in_child(cache, planned, loader, plan_seconds)
        cached = cache.find(prepared)  # None if it could not: then this process does, and meets what the child met
    cached, times, memory = _run_stages(planned, dispatch, loader, cached, plan_seconds)
    if cached is not None:
        times = LoadTimes(**{name: cached.numbers[name] for name in asdict(times)})
        memory.set_peaks(cached.numbers)
    elif cache is not None:
        _keep_weights(cache, planned, loader, {**asdict(times), **memory.peaks()})
    is_cached = None if cache is None or not prepared.chosen or quantizer.stored else cached is not None and not is_new
    if device_map is not None:
        model.hf_device_map = placement.hf_device_map()  # type: ignore[assignment]
    return LoadedComponent(model, prepared.plan, times, memory, placement, prepared.compute_dtype, is_cached, dispatch)


def _run_stages(
    planned: PlannedComponent,
    dispatch: Dispatch | None,
    loader: LoaderConfig,
    cached: CachedWeights | None,
    plan_seconds: float,
) -> tuple[CachedWeights | None, LoadTimes, PeakMemory]:
    """Run stages 7 to 9. Returns: (the cached weights, if they were used, times, memory)."""
    prepared, started = planned.prepared, time.perf_counter()
    model, request, quantizer = prepared.model, prepared.request, prepared.quantizer
    if cached is None and (request.warms_up_first or request.device.type != "cpu"):
        warm_up(prepared, request.device)  # before memory is measured: what libraries take is not the model's
    warm = time.perf_counter()
    with PeakMemory(request.device) as memory:
        cached = _read_weights(planned, dispatch, loader, cached)  # 7 stream, quantize, assign
        quantizer.postprocess_model(model, request.device)  # 8 finish; the audit below belongs to it
        compute_in_fp32(model, request.settings.keep_in_fp32_modules, prepared.compute_dtype)
        register(model, prepared)  # 9 mark the model as quantized
        if dispatch is not None:
            dispatch.start()
    audit(model, quantizer, prepared.plan.quantized_nbytes)
    return cached, LoadTimes(plan_seconds, warm - started, time.perf_counter() - warm), memory


def _quantize_in_child(
    cache: QuantizedCache, planned: PlannedComponent, loader: LoaderConfig, plan_seconds: float
) -> None:
    """Put the quantized weights of a load into the cache from a process of their own.

    What quantizing leaves in a process (heaps with holes, compiled loops) is then not in this one, whose memory is that
    of a load that finds them.
    """
    parent, child = os.getpid(), os.fork()
    if child:
        os.waitpid(child, 0)
        return
    try:
        die_with_parent(parent)
        torch.set_num_threads(1)  # the pool of OpenMP's threads did not come along; the loader's workers are made here
        _, times, memory = _run_stages(planned, None, loader, None, plan_seconds)
        cache.add(planned.prepared, {**asdict(times), **memory.peaks()})
    finally:
        os._exit(0)  # nothing of the parent's ends here, whatever was raised


def _read_weights(
    planned: PlannedComponent, dispatch: Dispatch | None, loader: LoaderConfig, cached: CachedWeights | None
) -> CachedWeights | None:
    """Run stage 7. Return the cached weights, if they were used."""
    if cached is not None:
        prepared = cached.in_place_of(planned.prepared)
        try:
            load_weights(_with_mapping(replace(planned, prepared=prepared), loader), None, loader)
            return cached
        except LoadError as error:  # an entry that was removed meanwhile; an error of the checkpoint comes again
            say(f"{cached.folder} cannot be read ({error}); its weights are quantized again")
    load_weights(planned, dispatch, loader)
    return None


def _keep_weights(
    cache: QuantizedCache, planned: PlannedComponent, loader: LoaderConfig, numbers: Mapping[str, float]
) -> None:
    """Put the quantized weights of a loaded model into the cache, and map them from there, as the next load will."""
    kept = cache.add(planned.prepared, numbers)
    if kept is not None:
        prepared = kept.in_place_of(planned.prepared, alone=True)
        try:
            load_weights(_with_mapping(replace(planned, prepared=prepared), loader), None, loader)
        except LoadError as error:
            say(f"{kept.folder} was removed meanwhile ({error}); the weights stay in memory as they are")


def _with_mapping(planned: PlannedComponent, loader: LoaderConfig) -> PlannedComponent:
    prepared = planned.prepared
    plan = choose_mapped(prepared.plan, prepared.quantizer, loader.map, prepared.request.component)
    return replace(planned, prepared=replace(prepared, plan=plan))


def load_component(
    source: ModelSource,
    component: str,
    settings: ComponentConfig,
    *,
    device: torch.device,
    loader: LoaderConfig,
    **options: Unpack[LoadOptions],
) -> LoadedComponent:
    """Load one component of a model, quantized as `settings` say, onto `device`, or where `device_map` puts it.

    options: see `LoadRequest`.
    Raises: ConfigError, MissingLibraryError, UnsupportedError or LoadError, most of them before a weight is read.
    """
    request = request_load(source, component, settings, device=device, **options)
    read_ahead(request.checkpoint.files)
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
        return done.value
    raise AssertionError("a load pauses once")


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
