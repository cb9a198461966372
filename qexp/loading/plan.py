"""What a load will do, decided from headers and a meta skeleton alone: complete before the first byte is read.

Each parameter and buffer of the model becomes one work item: its source in the checkpoint, and whether it is copied
(and cast), quantized, or put together from the inner tensors of a weight that the checkpoint holds ready quantized.
The plan knows the exact bytes of the result, and says of every linear layer whether it will be quantized, and if not,
why.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from qexp.checkpoints.checkpoint import Checkpoint
from qexp.checkpoints.conversion import transposed
from qexp.checkpoints.dtypes import TORCH_DTYPES
from qexp.checkpoints.gguf_types import TYPES
from qexp.checkpoints.tensor_entry import TensorEntry
from qexp.config.module_patterns import covering
from qexp.errors import ConfigError, LoadError
from qexp.loading.sharing import skip_all_names, tied_targets
from qexp.loading.streaming.lanes import has_streams
from qexp.loading.weight_reads import reason_not_to_pack, weight_reads
from qexp.loading.work_item import Read, WorkItem
from qexp.models.skeletons import COMPUTED
from qexp.quantizers.base import Quantizer
from qexp.quantizers.layers import computes_otherwise, is_transposed, linear_layers, weight_shape
from qexp.quantizers.rows import WeightSpec


@dataclass(frozen=True)
class LoadPlan:
    """items in file order; skipped: linear layer -> why it is not quantized; unused: tensors without a place;
    tied: parameter -> the one with another item that it is the same as, if nothing keeps them apart; not_linear: weight
    that no format quantizes, of two dimensions or more -> what it is instead; left_dense: the skipped layers for whose
    reason nobody asked; formats: quantized layer -> name of its format."""

    items: tuple[WorkItem, ...]
    skipped: Mapping[str, str]
    unused: tuple[str, ...]
    tied: Mapping[str, str] = field(default_factory=dict)
    not_linear: Mapping[str, str] = field(default_factory=dict)
    left_dense: tuple[str, ...] = ()
    formats: Mapping[str, str] = field(default_factory=dict)

    @property
    def distinct(self) -> list[WorkItem]:
        """One item for each tensor: without those that are tied to another."""
        return [item for item in self.items if item.target not in self.tied]

    @property
    def quantized(self) -> list[WorkItem]:
        return [item for item in self.distinct if item.spec is not None]

    @property
    def quantized_nbytes(self) -> dict[str, int]:
        """Layer -> bytes of its quantized weight."""
        return {item.spec.module: item.result_nbytes for item in self.items if item.spec is not None}

    @property
    def left_dense_share(self) -> float:
        """Of all weights, those of layers that stay dense though nobody asked for it; from 0 to 1."""
        targets = {f"{name}.weight" for name in self.left_dense}
        left = sum(item.numel for item in self.distinct if item.target in targets)
        return left / max(sum(item.numel for item in self.distinct), 1)

    def placed(self, device_of: Callable[[str], torch.device]) -> LoadPlan:
        """Return the plan with the device of each item, by its target."""
        return replace(self, items=tuple(_put_on_device(item, device_of(item.target)) for item in self.items))

    def _by_format(self) -> dict[str, Any]:
        """Format -> its layers, their bytes, and the bits of a weight in it."""
        found: dict[str, Any] = {}
        numel: dict[str, int] = {}
        for item in self.items:
            if item.spec is not None:
                name = self.formats[item.spec.module]
                numel[name] = numel.get(name, 0) + item.spec.numel
                one = found.setdefault(name, {"bits_per_weight": 0.0, "bytes": 0, "layers": []})
                one["bytes"] += item.result_nbytes
                one["bits_per_weight"] = 8 * one["bytes"] / numel[name]
                one["layers"].append(item.spec.module)
        return found

    def to_container(self) -> dict[str, Any]:
        """Return the plan as JSON-able data, for plan.json."""
        return {
            "result_bytes": sum(item.result_nbytes for item in self.distinct),
            "read_bytes": sum(item.nbytes for item in self.distinct),
            "dense_bytes": sum(item.dense_nbytes for item in self.distinct),
            "quantized": self.quantized_nbytes,
            "formats": self._by_format(),
            "skipped": dict(self.skipped),
            "left_dense": list(self.left_dense),
            "not_linear": {
                item.target: {"reason": self.not_linear[item.target], "bytes": item.result_nbytes}
                for item in self.distinct
                if item.target in self.not_linear
            },
            "unused": list(self.unused),
        }


def choose_modules(
    model: nn.Module,
    quantizer: Quantizer,
    patterns: Sequence[str],
    fp32_patterns: Sequence[str],
    dtype: torch.dtype,
    class_patterns: Sequence[str] = (),
) -> tuple[dict[str, WeightSpec], dict[str, str]]:
    """(linear layers to quantize, linear layers left alone -> why), from the skip rule and the format's limits.

    class_patterns: what the model's class keeps unquantized.
    """
    chosen: dict[str, WeightSpec] = {}
    skipped: dict[str, str] = {}
    if quantizer.quantization_method == "none":
        return chosen, skipped
    reads = weight_reads(model)
    for name, shape in linear_layers(model).items():
        module = model.get_submodule(name)
        spec = WeightSpec(name, shape, dtype, is_transposed(module))
        kept = covering(class_patterns, name)
        reason = _reason_to_skip(module, name, patterns, fp32_patterns) or (
            f"{type(model).__name__} keeps {kept!r} unquantized" if kept is not None else quantizer.reason_to_skip(spec)
        )
        reason = reason or reason_not_to_pack(reads.get(name, ()), quantizer.hides(spec))
        if reason is None:
            chosen[name] = spec
        else:
            skipped[name] = reason
    skip_all_names(model, chosen, skipped)
    return chosen, skipped


def find_quantized(
    model: nn.Module,
    quantizer: Quantizer,
    entries: Mapping[str, TensorEntry],
    patterns: Sequence[str],
    fp32_patterns: Sequence[str],
    dtype: torch.dtype,
) -> tuple[dict[str, WeightSpec], dict[str, str]]:
    """Choose modules as `choose_modules` does, from the layers that a quantized checkpoint holds.

    The skip rule counts for GGUF blocks alone, which are decoded while they are loaded.
    """
    chosen: dict[str, WeightSpec] = {}
    skipped: dict[str, str] = {}
    reads = weight_reads(model)
    decoded: dict[str, str] = {}
    for name, shape in linear_layers(model).items():
        module, parts = model.get_submodule(name), quantizer.stored_parts(name, entries)
        if parts is None:
            skipped[name] = "the checkpoint holds it unquantized"
            continue
        in_blocks = any(entry.block_type is not None for entry in parts.values())
        spec = WeightSpec(name, shape, dtype, is_transposed(module))
        read = reason_not_to_pack(reads.get(name, ()), quantizer.hides(spec))
        if read is not None and not in_blocks:
            raise LoadError(
                f"'{name}' is stored quantized, but {read}, so that every answer would be wrong; use a checkpoint that "
                "holds this layer unquantized"
            )
        asked = _reason_to_skip(module, name, patterns, fp32_patterns) or read
        reason = (asked or _reason_to_decode(parts["raw"])) if in_blocks else None
        if reason is None:
            chosen[name] = spec
        elif is_transposed(module):
            raise ConfigError(
                f"'{name}': {reason}, but its blocks hold the weight the other way round than {type(module).__name__} "
                "does; leave it quantized"
            )
        else:
            decoded[name] = f"{reason}: decoded"
    skip_all_names(model, chosen, decoded)
    return chosen, skipped | decoded


def _reason_to_skip(module: nn.Module, name: str, patterns: Sequence[str], fp32: Sequence[str]) -> str | None:
    if (pattern := covering(patterns, name)) is not None:
        return f"skip_modules has {pattern!r}"
    if (pattern := covering(fp32, name)) is not None:
        return f"kept in fp32 by {pattern!r}"
    if 0 in (weight_shape(module) or ()):
        return "it has no weights"
    if name == "":
        return "the model itself is a linear layer"
    if any(segment.startswith("lora") for segment in name.split(".")):
        return "it is a matrix of a LoRA"
    if computes_otherwise(module):
        return f"{type(module).__name__} does not compute as nn.Linear does"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is computed from other parameters"
    return "it has no weights" if weight.numel() == 0 else None


def _reason_to_decode(entry: TensorEntry) -> str | None:
    """Why GGUF blocks cannot stay: a block that goes on in the next row, which files of ComfyUI have."""
    block = TYPES[str(entry.block_type)].block
    return f"its blocks of {block} do not divide rows of {entry.shape[-1]}" if entry.shape[-1] % block else None


def make_plan(
    model: nn.Module,
    checkpoint: Checkpoint,
    quantizer: Quantizer,
    chosen: Mapping[str, WeightSpec],
    skipped: Mapping[str, str],
    fp32_patterns: Sequence[str],
    dtype: torch.dtype,
) -> LoadPlan:
    """Match the preprocessed skeleton with the checkpoint. Raises LoadError for missing keys and wrong shapes."""
    # targets: every tensor that a checkpoint must hold, parameters and persistent buffers
    targets, stored = dict(model.state_dict(keep_vars=True)), _stored_items(quantizer, checkpoint, chosen, dtype)
    absent = [name for name in targets if name not in checkpoint.entries and name not in stored]
    # tables that the network computes itself need no file
    absent = [name for name in absent if not hasattr(targets[name], COMPUTED)]
    missing = quantizer.update_missing_keys(absent)
    if missing:
        raise LoadError(_missing_message(missing, checkpoint, targets))
    items = list(stored.values())
    for name, tensor in targets.items():
        entry = checkpoint.entries.get(name) if name not in stored else None
        if entry is None:
            continue  # the quantizer sets it, or it is put together from its parts
        module, _, parameter = name.rpartition(".")
        spec = chosen.get(module) if parameter == "weight" else None
        if spec is not None:
            entry = transposed(entry) if spec.transposed else entry
            _check_fits(name, entry, spec.shape, True, checkpoint)
            items.append(WorkItem(name, entry, dtype, quantizer.quantized_nbytes(spec), spec))
        else:
            _check_fits(name, entry, tuple(tensor.shape), tensor.is_floating_point(), checkpoint)
            items.append(_copied(name, entry, torch.float32 if covering(fp32_patterns, name) else dtype, tensor.dtype))
    items = [replace(item, read=_choose_read(item, quantizer)) for item in items]
    # in the order of the files, which the kernel reads ahead
    items.sort(key=WorkItem.place)
    used = {entry.name for item in items for entry in item.entries} | targets.keys()
    unused = tuple(name for name, entry in checkpoint.entries.items() if not {name, entry.name} & used)
    tied = tied_targets(items, targets, quantizer)
    formats = {name: quantizer.layer_format(name) for name in chosen}
    return LoadPlan(tuple(items), skipped, unused, tied, not_linear_weights(model), formats=formats)


def _choose_read(item: WorkItem, quantizer: Quantizer) -> Read:
    is_plain = item.source.block_type is None and item.source.transform is None
    if item.spec is not None and not item.stored and is_plain and quantizer.takes_rows(item.spec):
        return "rows"
    return "in_place" if item.is_unchanged else "staged"


def _put_on_device(item: WorkItem, device: torch.device) -> WorkItem:
    # without streams, copying in pieces while the next are read gains nothing over one copy of the whole
    is_copied_whole = item.read == "in_place" and device.type != "cpu" and not has_streams(device)
    return replace(item, device=device, read="staged" if is_copied_whole else item.read)


def not_linear_weights(model: nn.Module) -> dict[str, str]:
    """Return the weights with two or more dimensions outside linear layers, with a description of each."""
    found = {}
    for path, module in model.named_modules():
        if weight_shape(module) is not None:
            continue
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.dim() >= 2:
                found[f"{path}.{own}" if path else own] = _kind_of(module, parameter)
    return found


def _kind_of(module: nn.Module, parameter: nn.Parameter) -> str:
    if isinstance(module, nn.Embedding):
        return "an embedding"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "a convolution"
    if parameter.dim() == 3 and "expert" in type(module).__name__.lower():
        return f"merged weights of {parameter.shape[0]} experts"
    return f"{type(module).__name__} is no linear layer"


def stored_part_names(quantizer: Quantizer, checkpoint: Checkpoint) -> set[str]:
    """Return the names of all tensors in a checkpoint that are parts of ready-quantized weights."""
    above = {name.rsplit(".", levels)[0] for name in checkpoint.entries for levels in range(1, 1 + name.count("."))}
    found = (quantizer.stored_parts(name, checkpoint.entries) for name in above)
    return {entry.name for parts in found if parts is not None for entry in parts.values()}


def _stored_items(
    quantizer: Quantizer, checkpoint: Checkpoint, chosen: Mapping[str, WeightSpec], dtype: torch.dtype
) -> dict[str, WorkItem]:
    """Return the items of the weights that the checkpoint holds ready quantized, by their targets."""
    items = {}
    for name, spec in chosen.items():
        parts = quantizer.stored_parts(name, checkpoint.entries)
        if parts is not None:
            quantizer.check_quantized_param_shape(spec, parts)
            (_, first), *others = parts.items()
            target, nbytes = f"{name}.weight", quantizer.stored_nbytes(spec, parts)
            items[target] = WorkItem(target, first, dtype, nbytes, spec, True, dict(others))
    return items


def _check_fits(
    name: str, entry: TensorEntry, shape: tuple[int, ...], floating_point: bool, checkpoint: Checkpoint
) -> None:
    if entry.shape != shape:
        raise LoadError(
            f"'{name}' has shape {list(entry.shape)} in '{entry.file}', but the model expects {list(shape)}; "
            f"the checkpoint belongs to another configuration: check '{checkpoint.path}/config.json'"
        )
    if _is_floating_point(entry) != floating_point:
        expected = "floating-point numbers" if floating_point else "whole numbers or truth values"
        raise LoadError(
            f"'{name}' is {entry.dtype} in '{entry.file}', but the model expects {expected}; the checkpoint is already "
            "quantized, or belongs to another model: set model.path to the original one"
        )


def _is_floating_point(entry: TensorEntry) -> bool:
    return entry.block_type is not None or TORCH_DTYPES[entry.dtype].is_floating_point


def _copied(name: str, entry: TensorEntry, dtype: torch.dtype, declared: torch.dtype) -> WorkItem:
    """A tensor that stays dense. Floating-point numbers become `dtype`; all others what the model declares, as in
    load_state_dict: files hold masks and positions as whole numbers of any width."""
    target = dtype if _is_floating_point(entry) else declared
    return WorkItem(name, entry, target, math.prod(entry.shape) * target.itemsize)


def _missing_message(missing: Sequence[str], checkpoint: Checkpoint, targets: Iterable[str]) -> str:
    more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
    shown = ", ".join(f"'{name}'" for name in missing[:5]) + more
    unused = sorted(set(checkpoint.entries) - set(targets))
    prefixed = [name for name in unused if name.endswith(f".{missing[0]}")]
    near = prefixed or difflib.get_close_matches(missing[0], unused, n=1)
    hint = f"; it has {near[0]!r}, which the model has not" if near else ""
    return (
        f"checkpoint '{checkpoint.path}' lacks {shown}{hint}; it is incomplete, or belongs to another model: "
        "download it again, or check model.path"
    )
