"""How a checkpoint holds bitsandbytes weights: the layout of the library's own state dicts, found, checked, read.

4-bit: `X.weight`, two weights to a byte, as [n, 1] of the storage dtype; beside it `X.weight.absmax` (fp32, or uint8
with double quantization), `.quant_map` f32[16], and `.quant_state.bitsandbytes__nf4` (or fp4), JSON as uint8: quant
type, block size, dtype and shape. Double quantization adds `.nested_absmax`, `.nested_quant_map` f32[256], and to the
JSON nested block size, dtype and offset. These tensors may lie in different files.
8-bit: `X.weight` int8 [out, in], `X.SCB` f32[out], the rows' absmaxes, and `X.weight_format`, 0 for rows in order.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qexp.errors import LoadError, choices
from qexp.quantizers.bitsandbytes_support.library import library
from qexp.quantizers.rows import WeightSpec
from qexp.quantizers.stored import Part, check_parts, lacks

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from qexp.checkpoints.tensor_entry import TensorEntry

TYPES_4BIT = ("fp4", "nf4")
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES_4BIT = ("float16", "bfloat16", "float32")
STORAGES = {  # dtype of a packed weight -> safetensors' name for it, and its bytes
    "uint8": ("U8", 1), "int8": ("I8", 1), "float16": ("F16", 2), "bfloat16": ("BF16", 2), "float32": ("F32", 4),
    "float64": ("F64", 8),
}  # fmt: skip
STATE_4BIT = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
DESCRIPTIONS = tuple(f"quant_state.bitsandbytes__{kind}" for kind in TYPES_4BIT)


def parts_4bit(name: str, entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry] | None:
    """Return the tensors of layer `name`, by their names behind `name.weight.`; None if it is not stored in 4 bits."""
    weight = f"{name}.weight"
    if not any(f"{weight}.{part}" in entries for part in DESCRIPTIONS):
        return None
    names = {"weight": weight, **{part: f"{weight}.{part}" for part in (*STATE_4BIT, *DESCRIPTIONS)}}
    return {part: entries[stored] for part, stored in names.items() if stored in entries}


def parts_8bit(name: str, entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry] | None:
    """Return the tensors of layer `name`, by their names behind `name.`; None if it is not stored in 8 bits."""
    if f"{name}.SCB" not in entries:
        return None
    names = ((part, f"{name}.{part}") for part in ("weight", "SCB", "weight_format"))
    return {part: entries[stored] for part, stored in names if stored in entries}


def check_4bit(spec: WeightSpec, parts: Mapping[str, TensorEntry], quant_storage: str) -> None:
    """Raise LoadError for what headers alone show to be wrong; the rest waits for the quant state to be read."""
    needed = {"weight", "absmax", "quant_map"}
    if nested := "nested_absmax" in parts or "nested_quant_map" in parts:
        needed |= {"nested_absmax", "nested_quant_map"}
    _check_complete(spec, parts, needed)
    dtype, width = STORAGES[quant_storage]
    expected = {
        "weight": Part((dtype,), ((math.ceil(spec.numel / 2) // width, 1),)),
        "absmax": Part(("U8",) if nested else ("F32",), None),  # how many there are, the quant state says
        "quant_map": Part(("F32",), ((16,),)),
        "nested_absmax": Part(("F32",), None),
        "nested_quant_map": Part(("F32",), ((256,),)),
        **dict.fromkeys(DESCRIPTIONS, Part(("U8",), None)),
    }
    check_parts(spec, parts, expected, "4 bits of bitsandbytes")


def check_8bit(spec: WeightSpec, parts: Mapping[str, TensorEntry]) -> None:
    _check_complete(spec, parts, {"weight", "SCB"})
    rows = (spec.shape[0],)
    expected = {
        "weight": Part(("I8",), (spec.shape,)),
        "SCB": Part(("F32",), (rows,)),
        "weight_format": Part(("U8",), ((), (1,))),
    }
    check_parts(spec, parts, expected, "8 bits of bitsandbytes")


def kept_nbytes(parts: Mapping[str, TensorEntry]) -> int:
    """Return bytes of the parameter that the tensors become."""
    kept = [entry.nbytes for part, entry in parts.items() if part in ("weight", "SCB", *STATE_4BIT)]
    return sum(kept) + (4 if "nested_absmax" in parts else 0)  # 4: the offset, which is stored as a number


def assemble_4bit(
    spec: WeightSpec, packed: Tensor, companions: Mapping[str, Tensor], device: torch.device, storage: torch.dtype
) -> nn.Parameter:
    from qexp.quantizers.bitsandbytes_support.parameters import safe_from_casts

    check_quant_state(spec, companions)
    packed = packed.contiguous().view(-1).view(storage).unsqueeze(1)
    kind = library().nn.Params4bit
    found = kind.from_prequantized(packed, dict(companions), requires_grad=False, device=device)
    return safe_from_casts(found)


def assemble_8bit(
    spec: WeightSpec, values: Tensor, companions: Mapping[str, Tensor], device: torch.device
) -> nn.Parameter:
    from qexp.quantizers.bitsandbytes_support.parameters import int8_params

    order = int(companions["weight_format"]) if "weight_format" in companions else 0
    if order != 0:
        remedy = "load and save it with bitsandbytes >= 0.45 first"
        raise _unusable_weight(spec, f"weight_format={order} is not rows in order (0); {remedy}")
    values, scale = values.to(device), companions["SCB"].to(device)
    return int8_params(values, scale, spec.dtype)


def check_quant_state(spec: WeightSpec, companions: Mapping[str, Tensor]) -> None:
    """Raise LoadError for a quant state that does not describe this weight, which the library would not notice."""
    described = [part for part in DESCRIPTIONS if part in companions]
    if len(described) != 1:
        raise _unusable_weight(spec, f"it has {choices(described)} at once")
    try:
        state: Any = json.loads(bytes(companions[described[0]].cpu().flatten().tolist()).decode())
        sizes = {name: state[name] for name in ("blocksize", "nested_blocksize") if name in state}
        shape, dtype, quant_type = list(state["shape"]), state["dtype"], state["quant_type"]
        offset = float(state.get("nested_offset", 0))
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise _unusable_weight(spec, f"its quant state cannot be read ({type(error).__name__}: {error})") from None
    rules = {
        f"shape {shape}": shape == list(spec.shape),
        f"quant_type {quant_type}": described[0].endswith(f"__{quant_type}"),
        f"blocksize {sizes.get('blocksize')}": _is_block_size(sizes.get("blocksize")),
        f"dtype {dtype}": dtype in DTYPES_4BIT,
        f"nested_offset {offset}": math.isfinite(offset),
    }
    _check_rules(spec, rules)
    blocks, nested = math.ceil(spec.numel / sizes["blocksize"]), "nested_absmax" in companions
    counts = {"absmax": blocks, "quant_map": 16}
    if nested:
        nested_rules = {
            f"nested_blocksize {sizes.get('nested_blocksize')}": _is_block_size(sizes.get("nested_blocksize")),
            f"nested_dtype {state.get('nested_dtype')}": state.get("nested_dtype") == "float32",
            "no nested_offset": type(state.get("nested_offset")) in (int, float),
        }
        _check_rules(spec, nested_rules)
        counts |= {"nested_absmax": math.ceil(blocks / sizes["nested_blocksize"]), "nested_quant_map": 256}
    shapes = {part: list(companions[part].shape) for part in counts}
    _check_rules(spec, {f"{part} of shape {shapes[part]}": shapes[part] == [count] for part, count in counts.items()})


def _is_block_size(value: object) -> bool:
    return type(value) is int and value in BLOCK_SIZES


def _check_rules(spec: WeightSpec, rules: Mapping[str, bool]) -> None:
    for value, holds in rules.items():
        if not holds:
            raise _unusable_weight(spec, f"its quant state has {value}")


def _check_complete(spec: WeightSpec, parts: Mapping[str, TensorEntry], needed: set[str]) -> None:
    if lacking := sorted(needed - parts.keys()):
        raise lacks(f"{lacking[0]!r} of the quantized weight of '{spec.module}'")


def _unusable_weight(spec: WeightSpec, why: str) -> LoadError:
    return LoadError(f"the quantized weight of '{spec.module}' cannot be used: {why}; download the checkpoint again")
