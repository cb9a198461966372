"""Stage 7 of a load: stream the weights, quantize them, put each into the model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qexp.checkpoints.finite_tensors import FiniteTensors
from qexp.config.schema import LoaderConfig
from qexp.errors import LoadError
from qexp.loading.component import PlannedComponent
from qexp.loading.sharing import aliases
from qexp.loading.streaming.stream import stream
from qexp.loading.work_item import WorkItem
from qexp.models.skeletons import COMPUTED
from qexp.offloading.dispatch import Dispatch
from qexp.quantizers.in_place import refuse_in_place
from qexp.quantizers.rows import is_finite
from qexp.system.machine_load import usable_threads
from qexp.system.memory import release_freed_memory
from qexp.system.progress import Progress

RELEASE_BYTES = 64 << 20  # how much is loaded before freed memory is given back; that costs page faults


def stream_plan(
    items: list[WorkItem],
    create: Any,
    loader: LoaderConfig,
    title: str,
    words: str | None = None,
    *,
    is_slow: bool = False,
) -> Iterator[tuple[WorkItem, Any]]:
    """Run work items through the pipeline with the loader's settings, showing progress.

    title, words: see `Progress`; None is for weights that are loaded.
    is_slow: whether the caller does more with a result than to keep it; no more of them than the loader's
    `in_flight_mib` wait for it then.
    """
    workers, in_flight_bytes = loader.workers or usable_threads(), loader.in_flight_mib << 20
    layers = [item for item in items if item.spec is not None and not item.stored]
    words = words or ("quantizing {} layers" if layers else "reading {} tensors")
    counted = {id(item) for item in layers or items}
    progress, unreleased_bytes = Progress(title, words, len(counted), sum(item.nbytes for item in items)), 0
    results = stream(
        items,
        create,
        workers=workers,
        in_flight_bytes=in_flight_bytes,
        ahead_bytes=in_flight_bytes if is_slow else None,
    )
    try:
        for item, result in results:
            progress.advance(item.nbytes, id(item) in counted)
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


def load_weights(planned: PlannedComponent, dispatch: Dispatch | None, loader: LoaderConfig) -> None:
    prepared, placement = planned.prepared, planned.placement
    model, component = prepared.model, prepared.request.component
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    finite = FiniteTensors()

    def create(item: WorkItem, first: Tensor, *others: Tensor) -> Tensor:
        if item.spec is None:
            copied = _dense(item, first)
            if item.target in parameters and not (item.mapped and item.source in finite):
                check_finite(item.target, copied)  # a buffer may hold a mask of infinities
                if item.mapped:
                    finite.add(item.source)
            return copied
        companions = dict(zip(item.companions, others, strict=True))
        weight = prepared.quantizer.create_quantized_param(item.spec, [first], companions, item.device)
        refuse_in_place(type(weight))  # what adds a LoRA in place would write into packed bytes
        return weight

    # groups that travel are loaded one by one, so each has a tied parameter of its own
    shared = {**placement.shared(), **aliases(model, prepared.plan.tied)}
    items = [item for item in prepared.plan.items if item.target not in shared]
    if dispatch is not None:
        dispatch.expect([item.target for item in items])

    is_slow = dispatch is not None  # it packs, pins, and writes groups to disk
    for item, tensor in stream_plan(items, create, loader, component, is_slow=is_slow):
        _assign(model, item.target, tensor)
        del tensor  # a group that is complete moves away: nobody else may hold it
        if dispatch is not None:
            dispatch.loaded(item.target)
    finite.keep()
    for name, first in shared.items():
        _assign(model, name, model.get_parameter(first))
    for name, parameter in model.named_parameters():
        if hasattr(parameter, COMPUTED) and parameter.device != placement.device_of(name):
            parameter.data = parameter.data.to(placement.device_of(name))
    for name, module in model.named_modules():  # buffers that no checkpoint holds were made on the CPU
        for own, buffer in module.named_buffers(recurse=False):
            device = placement.device_of(f"{name}.{own}" if name else own)
            if buffer.device != device and not buffer.is_meta and (dispatch is None or not dispatch.travels(module)):
                module._buffers[own] = buffer.to(device)


def _dense(item: WorkItem, stored: Tensor) -> Tensor:
    """Return a tensor that stays dense, on the device and in the dtype planned for it."""
    if not item.dtype.is_floating_point:
        _check_range(item, stored)
    if item.source.transform is not None:  # of what was read into memory that is used again
        return torch.empty(stored.shape, dtype=item.dtype, device=item.device).copy_(stored)
    if item.source.block_type is None:
        return stored.to(device=item.device, dtype=item.dtype)
    from qexp.quantizers.gguf_blocks.decode import decode_tensor

    return decode_tensor(item.source.block_type, stored.to(item.device), item.source.shape, item.dtype)


def _check_range(item: WorkItem, stored: Tensor) -> None:
    """Raise LoadError for a whole number that the model's dtype cannot hold: a cast would wrap it, and say nothing."""
    if stored.dtype == item.dtype or stored.numel() == 0:
        return
    limits = torch.iinfo(item.dtype) if item.dtype != torch.bool else None
    low, high = (limits.min, limits.max) if limits else (0, 1)
    values = stored.cpu().numpy()  # torch has no minimum of unsigned numbers wider than a byte
    wrong = [value for value in (int(values.min()), int(values.max())) if not low <= value <= high]
    if wrong:
        dtype = str(item.dtype).removeprefix("torch.")
        raise LoadError(
            f"'{item.target}' is {item.source.dtype} in '{item.source.file}' and holds {wrong[0]}, but the model "
            f"declares it as {dtype} ({low} to {high}); the checkpoint belongs to another model: check model.path"
        )


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise LoadError for a parameter with a value that is not finite: every answer of the model would be wrong."""
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
