"""The quantize-on-load lifecycle: from a checkpoint on disk to a quantized model, one weight at a time.

The nine stages stand in order in `load_component`. The full-precision model is never in memory: the skeleton has no
data, and each dense weight exists only until it is quantized.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qexp.checkpoints.checkpoint import Checkpoint, open_component
from qexp.checkpoints.conversion import converted
from qexp.checkpoints.dtypes import TORCH_DTYPES
from qexp.config.module_patterns import patterns_lost, unmatched_patterns
from qexp.errors import ConfigError, LoadError, first_names
from qexp.interop.interfaces import kept_by_class
from qexp.loading.audit import audit
from qexp.loading.device_map import (
    DeviceMap,
    Placement,
    main_device,
    no_split_classes,
    place,
    to_keep_in_fp32,
)
from qexp.loading.fp32 import compute_in_fp32
from qexp.loading.plan import (
    LoadPlan,
    WorkItem,
    choose_modules,
    find_quantized,
    make_plan,
    stored_part_names,
    with_tied_entries,
)
from qexp.loading.registration import register
from qexp.loading.streaming.lanes import has_streams
from qexp.loading.streaming.stream import Choice, nowhere, on_cpu, stream
from qexp.models.skeletons import on_meta, without_initialization
from qexp.offloading.dispatch import Dispatch
from qexp.quantizers.base import Quantizer, WeightSpec, is_finite, load_quantizer, replace_module
from qexp.quantizers.embedded import merge, stored_config
from qexp.quantizers.layers import MARK, to_linear
from qexp.system.device_names import MaxMemory
from qexp.system.memory import GIB, PeakMemory, release_freed_memory, without_collector
from qexp.system.progress import Progress

if TYPE_CHECKING:
    from qexp.config.schema import ComponentConfig, LoaderConfig
    from qexp.models.base import ModelSource

LARGE_SHARE = 0.2  # of weights that cannot be quantized: more is worth a warning
RELEASE_BYTES = 64 << 20  # how much is loaded before freed memory is given back; that costs page faults


@dataclass(frozen=True)
class Prepared:
    """Stages 1 to 6: everything decided, nothing read."""

    model: nn.Module
    quantizer: Quantizer
    chosen: Mapping[str, WeightSpec]
    plan: LoadPlan
    compute_dtype: torch.dtype
    own_dtype: torch.dtype | None  # the checkpoint's, in which it computes if nothing is asked for
    config: Mapping[str, Any]  # parsed config.json
    path: Path  # of the checkpoint
    carried_files: tuple[str, ...]  # names of what a saved model takes along from there
    unmatched: Mapping[str, Mapping[str, str]]  # setting -> pattern that matches no module -> what to say of it

    def check_patterns(self) -> None:
        """Raises ConfigError for a pattern that matches no module."""
        for message in (message for found in self.unmatched.values() for message in found.values()):
            raise ConfigError(message)


@dataclass(frozen=True)
class PlannedComponent:
    """A component that is prepared, and where it will be."""

    name: str
    settings: ComponentConfig
    prepared: Prepared
    device: torch.device
    placement: Placement
    no_split: set[str]
    offload_folder: Path | None
    has_map: bool


@dataclass(frozen=True)
class LoadedComponent:
    """A model ready to run, the plan it was loaded by, and what loading it took."""

    model: nn.Module
    plan: LoadPlan
    seconds: float
    memory: PeakMemory
    placement: Placement
    compute_dtype: torch.dtype
    dispatch: Dispatch | None = None  # where the model runs over several devices, or rests where it does not compute


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
        _load_weights(prepared, planned.name, placement, dispatch, loader)  # 7 stream, quantize, assign
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


def prepare(
    source: ModelSource,
    component: str,
    settings: ComponentConfig,
    checkpoint: Checkpoint,
    quantizer: Quantizer,
    *,
    device: torch.device,
) -> Prepared:
    """Stages 3 to 6: check the machine, settle the dtype, build the skeleton on meta, swap modules, make the plan."""
    _validate_environment(quantizer, checkpoint, device)  # 3
    own_dtype = _own_dtype(checkpoint, quantizer)
    dtype = own_dtype if settings.compute_dtype is None else getattr(torch, settings.compute_dtype)
    if dtype is None:
        raise ConfigError(f"'{checkpoint.path}' has no unquantized floating-point tensors; set compute_dtype")
    compute_dtype = quantizer.update_torch_dtype(dtype)  # 4
    model, checkpoint = skeleton_and_names(source, component, checkpoint)  # 5
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    skip = (*settings.skip_modules, *quantizer.skip_modules)
    asked = {"skip_modules": skip, "keep_in_fp32_modules": settings.keep_in_fp32_modules}
    unmatched = {name: unmatched_patterns(found, names, f"{name} of '{component}'") for name, found in asked.items()}
    in_fp32, unquantized = kept_by_class(model, compute_dtype)
    fp32 = (*settings.keep_in_fp32_modules, *in_fp32)
    if quantizer.stored:  # 6
        chosen, skipped = find_quantized(model, quantizer, checkpoint.entries, skip, fp32, compute_dtype)
        if lost := patterns_lost((*settings.skip_modules, *settings.keep_in_fp32_modules), chosen):
            print(f"warning: {component}: {lost}", file=sys.stderr)
    else:
        own = source.skip_modules(component, model) if hasattr(source, "skip_modules") else ()
        chosen, skipped = choose_modules(model, quantizer, (*skip, *own), fp32, compute_dtype, unquantized)
    if not chosen and quantizer.quantization_method != "none":
        raise LoadError(_nothing_message(component, quantizer, skipped))
    _swap_layers(model, quantizer, chosen, compute_dtype)
    plan = make_plan(model, checkpoint, quantizer, chosen, skipped, fp32, compute_dtype)
    if plan.unused:
        print(_unused_message(component, plan.unused), file=sys.stderr)
    if chosen and (message := not_linear_message(component, plan)):
        print(message, file=sys.stderr)
    carried = source.carried_files() if hasattr(source, "carried_files") else ()
    config, path = dict(checkpoint.config), checkpoint.path
    return Prepared(model, quantizer, chosen, plan, compute_dtype, own_dtype, config, path, carried, unmatched)


def _swap_layers(
    model: nn.Module, quantizer: Quantizer, chosen: Mapping[str, WeightSpec], compute_dtype: torch.dtype
) -> None:
    """Put layers that hold quantized weights in the place of the chosen ones, linear by class or by what they do."""
    transposed = {name: type(model.get_submodule(name)) for name, spec in chosen.items() if spec.transposed}
    for name in transposed:
        replace_module(model, name, to_linear(model.get_submodule(name)))
    with without_initialization():
        quantizer.preprocess_model(model, list(chosen), compute_dtype)
    for name, kind in transposed.items():
        setattr(model.get_submodule(name), MARK, kind)


def skeleton_and_names(source: ModelSource, component: str, checkpoint: Checkpoint) -> tuple[nn.Module, Checkpoint]:
    """The network on the meta device, and the checkpoint under the names of all its tensors."""
    with on_meta():
        model = source.skeleton(component, dict(checkpoint.config)).eval().requires_grad_(False)
    return model, with_tied_entries(_under_model_names(source, component, checkpoint, model), model)


def _under_model_names(source: ModelSource, component: str, checkpoint: Checkpoint, model: nn.Module) -> Checkpoint:
    """The checkpoint with tensors named as the model's: converted by the source where a name or shape is another."""
    conversion = source.conversion(component, model) if hasattr(source, "conversion") else None
    entries = checkpoint.entries
    fits = all(name in entries and entries[name].shape == t.shape for name, t in model.state_dict().items())
    if conversion is None or fits:
        return checkpoint
    return converted(checkpoint, conversion)


def _validate_environment(quantizer: Quantizer, checkpoint: Checkpoint, device: torch.device) -> None:
    """A setting that is wrong is the checkpoint's where it embeds them."""
    try:
        quantizer.validate_environment(device)
    except ConfigError as error:
        if not quantizer.stored:
            raise
        place = f"the quantization_config of '{checkpoint.path}'"
        raise LoadError(f"{place} cannot be used: {error}; check its config.json") from error


def stream_plan(
    items: list[WorkItem],
    create: Any,
    loader: LoaderConfig,
    title: str,
    *,
    device_of: Callable[[WorkItem], torch.device] = on_cpu,
    in_place: Choice = nowhere,
    by_rows: Choice = nowhere,
    is_slow: bool = False,
) -> Iterator[tuple[WorkItem, Any]]:
    """Run work items through the pipeline with the loader's settings, showing progress.

    device_of, in_place, by_rows: see `stream`.
    is_slow: whether the caller does more with a result than to keep it; no more of them than the loader's
    `in_flight_mib` wait for it then.
    """
    workers, in_flight_bytes = loader.workers or len(os.sched_getaffinity(0)), loader.in_flight_mib << 20
    progress, unreleased_bytes = Progress(title, len(items), sum(item.nbytes for item in items)), 0
    results = stream(
        items,
        create,
        workers=workers,
        in_flight_bytes=in_flight_bytes,
        device_of=device_of,
        in_place=in_place,
        by_rows=by_rows,
        ahead_bytes=in_flight_bytes if is_slow else None,
    )
    try:
        for item, result in results:
            progress.advance(item.nbytes)
            unreleased_bytes += item.nbytes
            if unreleased_bytes >= RELEASE_BYTES:
                release_freed_memory()
                unreleased_bytes = 0
            held = [result]
            del result  # the caller may give it up before it asks for the next one
            yield item, held.pop()
    finally:
        progress.close()
        release_freed_memory()


def _load_weights(
    prepared: Prepared, component: str, placement: Placement, dispatch: Dispatch | None, loader: LoaderConfig
) -> None:
    model = prepared.model
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}

    def device_of(item: WorkItem) -> torch.device:  # also of what travels there: it gets the bytes of a resident weight
        return placement.device_of(item.target)

    def create(item: WorkItem, first: Tensor, *others: Tensor) -> Tensor:
        device = device_of(item)
        if item.spec is None:
            copied = _dense(item, first, device)
            if item.target in parameters:  # a buffer may hold a mask of infinities
                check_finite(item.target, copied)
            return copied
        companions = dict(zip(item.companions, others, strict=True))
        return prepared.quantizer.create_quantized_param(item.spec, [first], companions, device)

    shared = placement.shared()  # groups that travel are loaded one by one, so each has a tied parameter of its own
    items = [item for item in prepared.plan.items if item.target not in shared]
    if dispatch is not None:
        dispatch.expect([item.target for item in items])

    def shares(item: WorkItem) -> bool:  # whether its result may share what was read
        return device_of(item).type == "cpu" or has_streams(device_of(item))

    def dense_weight(item: WorkItem) -> bool:  # which quantizers take in slices of rows
        is_plain = item.source.block_type is None and item.source.transform is None
        return item.spec is not None and not item.stored and is_plain and prepared.quantizer.takes_rows(item.spec)

    title, is_slow = f"{component}: loading", dispatch is not None  # which packs, pins, and writes groups to disk
    results = stream_plan(
        items,
        create,
        loader,
        title,
        device_of=device_of,
        in_place=shares,
        by_rows=dense_weight,
        is_slow=is_slow,
    )
    for item, tensor in results:
        _assign(model, item.target, tensor)
        del tensor  # a group that is complete moves away: nobody else may hold it
        if dispatch is not None:
            dispatch.loaded(item.target)
    for name, first in shared.items():
        _assign(model, name, model.get_parameter(first))
    for name, module in model.named_modules():  # buffers that no checkpoint holds were made on the CPU
        for own, buffer in module.named_buffers(recurse=False):
            device = placement.device_of(f"{name}.{own}" if name else own)
            if buffer.device != device and not buffer.is_meta and (dispatch is None or not dispatch.travels(module)):
                module._buffers[own] = buffer.to(device)


def _dense(item: WorkItem, stored: Tensor, device: torch.device) -> Tensor:
    """A tensor that stays dense, on `device` in the dtype planned for it."""
    if item.source.transform is not None:  # of what was read into memory that is used again
        return torch.empty(stored.shape, dtype=item.dtype, device=device).copy_(stored)
    if item.source.block_type is None:
        return stored.to(device=device, dtype=item.dtype)
    from qexp.quantizers.gguf_blocks.decode import decode_tensor

    return decode_tensor(item.source.block_type, stored.to(device), item.source.shape, item.dtype)


def check_finite(name: str, tensor: Tensor) -> None:
    """Raises LoadError for a parameter with a value that is not finite: every answer of the model would be wrong."""
    if not is_finite(tensor):
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise LoadError(f"'{name}' is not finite in {dtype}; repair the checkpoint, or use another compute_dtype")


def _assign(model: nn.Module, target: str, tensor: Tensor) -> None:
    """The one place that puts a loaded tensor into the model."""
    path, _, name = target.rpartition(".")
    module = model.get_submodule(path)
    if name in module._buffers:
        module._buffers[name] = tensor
        return
    if not isinstance(tensor, nn.Parameter):
        tensor = nn.Parameter(tensor, requires_grad=False)
    module.register_parameter(name, tensor)


def plan_statistics(plans: Sequence[LoadPlan], weights_bytes: int) -> dict[str, float]:
    """Counts of modules, and the `memory/` numbers of the weights. weights_bytes: true bytes of all components."""
    items = [item for plan in plans for item in plan.distinct]
    quantized = [item for plan in plans for item in plan.quantized]
    numel = sum(item.numel for item in items)
    statistics: dict[str, float] = {
        "load/quantized_modules": len(quantized),
        "load/skipped_modules": sum(len(plan.skipped) for plan in plans),
        "load/unused_tensors": sum(len(plan.unused) for plan in plans),
        "memory/weights_gib": weights_bytes / GIB,
        "memory/dense_weights_gib": sum(item.dense_nbytes for item in items) / GIB,
        "memory/model_bits_per_weight": 8 * weights_bytes / max(numel, 1),
    }
    if quantized:
        bits = 8 * sum(item.result_nbytes for item in quantized)
        statistics["memory/bits_per_weight"] = bits / sum(
            item.spec.numel for item in quantized if item.spec is not None
        )
    return statistics


def _unused_message(component: str, unused: Sequence[str]) -> str:
    places = "tensors of the checkpoint have no place in the model and are not read"
    return f"{component}: {len(unused)} {places}: {first_names(unused)}"


def not_linear_message(component: str, plan: LoadPlan) -> str | None:
    """A warning, if weights that no format quantizes are a large part of the model."""
    items = [item for item in plan.distinct if item.target in plan.not_linear]
    share = sum(item.numel for item in items) / max(sum(item.numel for item in plan.distinct), 1)
    if share <= LARGE_SHARE:
        return None
    items.sort(key=lambda item: -item.result_nbytes)
    shown = ", ".join(f"'{item.target}' ({plan.not_linear[item.target]})" for item in items[:3])
    return (
        f"warning: {component}: {share:.0%} of its weights are not those of linear layers and stay unquantized, "
        f"{sum(item.result_nbytes for item in items) / GIB:.2f} GiB: {shown}{' …' if len(items) > 3 else ''}"
    )


def _nothing_message(component: str, quantizer: Quantizer, skipped: Mapping[str, str]) -> str:
    reasons = ", ".join(f"'{name}' ({reason})" for name, reason in list(skipped.items())[:3])
    if quantizer.stored:
        return (
            f"'{component}' is a checkpoint of {quantizer.quantization_method}, but no quantized weight is a linear "
            f"layer's: {reasons or 'the model has none'}; check that its "
            "config.json belongs to it, and skip_modules"
        )
    why = f"every linear layer is skipped: {reasons}" + (" …" if len(skipped) > 3 else "")
    return (
        f"backend {quantizer.quantization_method!r} would have quantized no layer of '{component}': "
        f"{why if skipped else 'it has no linear layers'}; loosen skip_modules, or use backend=none"
    )


def resolve_quantizer(backend: Any, checkpoint: Checkpoint, component: str) -> Quantizer:
    """The quantizer of `backend`, or of the config that the checkpoint embeds: that one wins, with a warning."""
    embedded = stored_config(checkpoint, backend)
    if embedded is None:
        return load_quantizer(backend)
    if lost := merge(backend, embedded):
        print(f"warning: {component}: the checkpoint is quantized already; unused: {', '.join(lost)}", file=sys.stderr)
    quantizer = load_quantizer(embedded)
    quantizer.stored, quantizer.metadata = True, checkpoint.metadata
    return quantizer


def _own_dtype(checkpoint: Checkpoint, quantizer: Quantizer) -> torch.dtype | None:
    """The dtype that a stored format comes with, or the one of most floating-point bytes in the checkpoint that are no
    quantized weight's; None if there are none."""
    if quantizer.stored and (own := quantizer.stored_dtype()) is not None:
        return own
    sizes: dict[torch.dtype, int] = {}
    parts = stored_part_names(quantizer, checkpoint)
    for entry in (entry for name, entry in checkpoint.entries.items() if name not in parts):
        stored = TORCH_DTYPES.get(entry.dtype)
        if stored in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            sizes[stored] = sizes.get(stored, 0) + entry.nbytes
    if not sizes:
        return None
    most = max(sizes, key=lambda stored: sizes[stored])
    return torch.float32 if most == torch.float64 else most  # no format is quantized from, or computes in, float64


def warm_up(prepared: Prepared, device: torch.device) -> None:
    """Quantize a small weight, so that libraries and thread pools are there before memory and time are measured."""
    first = next(iter(prepared.chosen.values()), None)  # of a width that the format can hold
    if first is None or first.numel == 0 or prepared.quantizer.stored:
        return
    spec = replace(first, shape=(64, first.shape[1]))
    with torch.no_grad():
        prepared.quantizer.create_quantized_param(spec, [torch.ones(spec.shape)], {}, device)
