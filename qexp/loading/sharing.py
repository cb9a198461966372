"""What a model uses under several names: one module, or one weight of several layers, is one in memory and in a file.

A file keeps a shared tensor under one of its names, and a quantized weight as several tensors: bitsandbytes has
`X.weight.absmax` or `X.SCB` beside `X.weight`, torchao `X._weight_qdata` in place of it. So all of them are looked up,
and left out, together. Which names belong together is seen in the skeleton, before any layer of it is swapped.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from qexp.checkpoints.checkpoint import Checkpoint
from qexp.errors import ConfigError, first_names
from qexp.loading.work_item import WorkItem
from qexp.quantizers.base import Quantizer
from qexp.quantizers.layers import linear_layers, weight_shape
from qexp.quantizers.rows import WeightSpec


def with_tied_entries(checkpoint: Checkpoint, model: nn.Module) -> Checkpoint:
    """Return the checkpoint with an entry for every name of a shared tensor and of its stored parts.

    One of them may be quantized where another (an embedding) is not; those that are not stay one parameter.
    model: the skeleton, before any module of it is swapped.
    """
    targets, names_of = dict(model.state_dict(keep_vars=True)), dict[Any, list[str]]()
    for name, tensor in targets.items():
        names_of.setdefault(_memory_key(tensor), []).append(name)
    entries, metadata = dict(checkpoint.entries), dict(checkpoint.metadata)
    for names in (names for names in names_of.values() if len(names) > 1):
        parts = {name: _names_of_parts(name, model, targets, checkpoint.entries) for name in names}
        holders = [name for name in names if parts[name]]
        for name in names:
            if name in checkpoint.entries or not holders:  # stored by itself, or missing
                continue
            # a quantized weight is that of a linear layer, and an embedding tied to it stays dense
            first = min(holders, key=lambda holder: _is_linear_weight(model, holder) != _is_linear_weight(model, name))
            for part in parts[first]:
                entries.setdefault(_renamed(part, first, name), checkpoint.entries[part])
            if first in metadata:  # torchao describes its weights there
                metadata.setdefault(name, metadata[first])
    return replace(checkpoint, entries=entries, metadata=metadata)


def _is_linear_weight(model: nn.Module, name: str) -> bool:
    """Return whether a tensor is the weight of a linear layer."""
    layer, _, own = name.rpartition(".")
    return own == "weight" and weight_shape(model.get_submodule(layer)) is not None


def _names_of_parts(name: str, model: nn.Module, targets: Iterable[str], entries: Iterable[str]) -> list[str]:
    """Return the tensors of a checkpoint that make up the one called `name`: itself and its companions."""
    if not _is_linear_weight(model, name):
        return [name] if name in entries else []
    layer = name.rpartition(".")[0]
    others = {target for target in targets if target != name}
    return [entry for entry in entries if entry.startswith(f"{layer}.") and entry not in others]


def _renamed(part: str, first: str, name: str) -> str:
    """Return the name of a part of `first`, as a part of `name`."""
    if part == first:
        return name
    return name.rpartition(".")[0] + part.removeprefix(first.rpartition(".")[0])


def tied_targets(items: Iterable[WorkItem], targets: Mapping[str, Tensor], quantizer: Quantizer) -> dict[str, str]:
    """Parameter -> the earlier one that is made of the same tensors in the same way, so that they are one."""
    by_target, first_of, tied = {item.target: item for item in items}, dict[Any, str](), dict[str, str]()
    for name, tensor in targets.items():
        item = by_target.get(name)
        if item is None or not isinstance(tensor, nn.Parameter):
            continue
        spec, source = item.spec, item.source
        form = item.dtype if spec is None else (spec.shape, spec.transposed, quantizer.format_key(spec))
        first = first_of.setdefault((source.file, source.offset, source.name, form), name)
        if first != name:
            tied[name] = first
    return tied


def aliases(model: nn.Module, tied: Mapping[str, str]) -> dict[str, str]:
    """Return those of the tied parameters that are the same parameter of the same module, under another name."""
    return {name: first for name, first in tied.items() if _site_of(model, name) == _site_of(model, first)}


def _site_of(model: nn.Module, target: str) -> tuple[int, str]:
    path, _, own = target.rpartition(".")
    return id(model.get_submodule(path)), own


def skip_all_names(model: nn.Module, chosen: dict[str, WeightSpec], skipped: dict[str, str]) -> None:
    """Skip a layer under all of its names that is skipped under one, and those tied to it: they have one weight."""
    name_of = {_weight_id(model, name): name for name in skipped}
    for name in list(chosen):
        other = name_of.get(_weight_id(model, name))
        if other is not None:
            del chosen[name]
            skipped[name] = f"its weight is that of '{other}': {skipped[other]}"


def check_one_format(model: nn.Module, quantizer: Quantizer) -> None:
    """Raise ConfigError where a backend gives two formats to one weight. model: the skeleton."""
    for names in layers_by_weight(model):
        if len(names) > 1 and (reason := quantizer.conflict(names)) is not None:
            raise ConfigError(f"{first_names(names)} have one weight, but {reason}")


def layers_by_weight(model: nn.Module) -> list[list[str]]:
    """Return the names of all linear layers, those that have one weight together. model: the skeleton."""
    names_of: dict[Any, list[str]] = {}
    for name in linear_layers(model):
        names_of.setdefault(_weight_id(model, name), []).append(name)
    return list(names_of.values())


def _weight_id(model: nn.Module, name: str) -> Any:
    module = model.get_submodule(name)
    weight = module._parameters.get("weight")
    return id(module) if weight is None else _memory_key(weight)


def _memory_key(tensor: Tensor) -> Any:
    """Return the identity of a tensor on the meta device.

    A parameter that is assigned there twice becomes two objects.
    """
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride()


def distinct_state(model: nn.Module, quantizer: Quantizer | None) -> dict[str, Tensor]:
    """Return the state dict of a loaded model, what is shared under the first of its names."""
    state, modules, weights = dict(model.state_dict()), set[int](), set[int]()
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) in modules:
            _drop_below(state, name)
            continue
        modules.add(id(module))
        if quantizer is not None and quantizer.is_quantized(module):
            if id(module.weight) in weights:
                _drop_below(state, name, keep={*module._parameters, *module._buffers} - {"weight"})
            weights.add(id(module.weight))
    return state


def _drop_below(state: dict[str, Tensor], name: str, keep: Collection[str] = ()) -> None:
    for key in [key for key in state if key.startswith(f"{name}.") and key.removeprefix(f"{name}.") not in keep]:
        del state[key]
