"""Read 8-bit weights that are stored with separate scales as weight × scale.

Scales that programs write for `X.weight` in float8 or int8:

    X.scale_weight        one number: ComfyUI, with a tensor `scaled_fp8` in the file
    X.weight_scale        one number, one a row [out] or [out, 1], or one a block or group [out/b, in/g]: ComfyUI,
                          llm-compressor (compressed-tensors), fbgemm, ModelOpt
    X.weight_scale_inv    one a block [⌈out/128⌉, ⌈in/128⌉]: DeepSeek, transformers' fp8. Multiplied, whatever its name

Scales of activations (X.input_scale, X.scale_input) are ignored: they serve 8-bit products, which are not computed
here. ComfyUI names a layer's format in `X.comfy_quant` or in the file's metadata. Any other format, and a zero point,
is an error: its values would be misread.

Source: ComfyUI's comfy/ops.py and quant_ops.py, transformers' integrations/finegrained_fp8.py, compressed-tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from qexp.checkpoints.regular_file import open_regular
from qexp.checkpoints.tensor_entry import TensorEntry
from qexp.errors import LoadError, choices

if TYPE_CHECKING:
    from torch import Tensor

FLOAT8 = ("F8_E4M3", "F8_E5M2")
SCALES = ("scale_weight", "weight_scale", "weight_scale_inv")
OF_ACTIVATIONS = ("scale_input", "input_scale")
MARKER = "scaled_fp8"  # of a whole file
LAYER_FORMAT, METADATA_FORMATS = "comfy_quant", "_quantization_metadata"
FORMATS = ("float8_e4m3fn", "float8_e5m2")  # by ComfyUI's names
METHODS = ("fp8", "fbgemm_fp8", "compressed-tensors", "modelopt")  # quant_method of configs that may say no more
BLOCK = 128  # of weight_scale_inv, where no config says more


def with_scales_applied(
    config: Mapping[str, Any], entries: Mapping[str, TensorEntry], metadata: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, TensorEntry]]:
    """Return a checkpoint's config and tensors with every scaled weight as an fp32 tensor, its scale applied.

    Raises: LoadError for scales that do not fit their weight, and for unknown formats.
    """
    scales = {name: scale for name in entries if (scale := _scale_of(name, entries)) is not None}
    if not scales:
        return dict(config), dict(entries)
    _check_formats(entries, metadata)
    quantization = config.get("quantization_config") or {}
    used, result = {entry.name for entry in scales.values()}, dict(entries)
    for name, scale in scales.items():
        result[name] = _apply_scale(entries[name], scale, quantization.get("weight_block_size"))
        used |= {found for own in (*OF_ACTIVATIONS, LAYER_FORMAT) if (found := _sibling_name(name, own)) in entries}
    used |= {name for name in entries if name.rpartition(".")[2] == MARKER}
    says_more = any(entry.dtype in FLOAT8 for name, entry in result.items() if name not in used)
    is_all = quantization.get("quant_method") in METHODS and not says_more
    kept = {key: value for key, value in config.items() if not (is_all and key == "quantization_config")}
    return kept, {name: entry for name, entry in result.items() if name not in used}


def _sibling_name(name: str, own: str) -> str:
    return f"{name.removesuffix('weight')}{own}"


def _scale_of(name: str, entries: Mapping[str, TensorEntry]) -> TensorEntry | None:
    """Return the scale of a weight, if any. Raises LoadError for several scales, or for a zero point."""
    if not name.endswith(".weight") or entries[name].dtype not in (*FLOAT8, "I8"):
        return None
    found = [other for own in SCALES if (other := _sibling_name(name, own)) in entries]
    more = [other for own in ("weight_scale_2", "weight_zero_point") if (other := _sibling_name(name, own)) in entries]
    if len(found) > 1 or (found and more):
        raise LoadError(
            f"'{name}' in '{entries[name].file}' has {choices([*found, *more])} beside it, an unknown combination; use "
            "the unquantized checkpoint"
        )
    return entries[found[0]] if found else None


def _check_formats(entries: Mapping[str, TensorEntry], metadata: Mapping[str, str]) -> None:
    """Raise LoadError for a layer in a ComfyUI format other than float8 with a scale."""
    formats = {name: _json(_content(entry)) for name, entry in entries.items() if name.endswith(f".{LAYER_FORMAT}")}
    layers = _json(metadata.get(METADATA_FORMATS, "{}")).get("layers", {})
    formats |= layers if isinstance(layers, dict) else {METADATA_FORMATS: layers}
    for name, said in formats.items():
        kind = said.get("format") if isinstance(said, dict) else said
        if kind not in FORMATS:
            raise LoadError(
                f"'{name}' has the format {kind!r}, which is not supported (supported: {choices(FORMATS)}); use the "
                "unquantized checkpoint"
            )


def _content(entry: TensorEntry) -> bytes:
    with open_regular(entry.file) as (stream, _):
        stream.seek(entry.offset)
        return stream.read(entry.nbytes)


def _json(text: str | bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {"format": text}


def _apply_scale(weight: TensorEntry, scale: TensorEntry, block_size: Any) -> TensorEntry:
    """Return the entry of a weight with its scale applied."""
    blocks = _blocks(weight, scale, block_size)
    pieces = tuple(replace(entry, dtype="U8", shape=(entry.nbytes,)) for entry in (scale, weight))  # scale: aligned
    return replace(
        weight,
        dtype="F32",
        nbytes=weight.nbytes + scale.nbytes,
        pieces=pieces,
        transform=partial(_dequantize, weight=weight, scale=scale, blocks=blocks),
    )


def _blocks(weight: TensorEntry, scale: TensorEntry, block_size: Any) -> tuple[int, ...]:
    """Return the size of the block that one scale covers, for each dimension. Raises LoadError."""
    shape, counts = weight.shape, scale.shape
    if math.prod(counts) == 1:
        return shape
    if scale.dtype not in ("F32", "F16", "BF16", "F64") or not shape:
        raise _unfit(weight, scale)
    if len(counts) == 1 and counts[0] == shape[0]:
        counts = (counts[0], *[1] * (len(shape) - 1))
    if len(counts) != len(shape):
        raise _unfit(weight, scale)
    sizes = [tuple(block_size)] if isinstance(block_size, list) and len(block_size) == len(shape) else []
    sizes += [(BLOCK,) * len(shape)] if scale.name.endswith("_inv") else []
    if all(count and size % count == 0 for size, count in zip(shape, counts, strict=True)):
        sizes.append(tuple(size // count for size, count in zip(shape, counts, strict=True)))
    fitting = [blocks for blocks in sizes if _counts(shape, blocks) == counts]
    if not fitting:
        raise _unfit(weight, scale)
    return fitting[0]


def _counts(shape: tuple[int, ...], blocks: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(-(-size // block) for size, block in zip(shape, blocks, strict=True))


def _unfit(weight: TensorEntry, scale: TensorEntry) -> LoadError:
    return LoadError(
        f"'{scale.name}' {list(scale.shape)} {scale.dtype} cannot be the scale of '{weight.name}' {list(weight.shape)} "
        f"in '{weight.file}': a scale has one number, one per row or one per block; use the unquantized checkpoint"
    )


def _dequantize(raw: Tensor, *, weight: TensorEntry, scale: TensorEntry, blocks: tuple[int, ...]) -> Tensor:
    """Multiply the weight by its scale. raw: the bytes of the scale, then of the weight."""
    from qexp.checkpoints.dtypes import TORCH_DTYPES

    if raw.is_meta:
        return raw.new_empty(weight.shape, dtype=TORCH_DTYPES["F32"])
    factor = raw[: scale.nbytes].view(TORCH_DTYPES[scale.dtype]).float()
    numbers = raw[scale.nbytes :].view(TORCH_DTYPES[weight.dtype]).view(weight.shape).float()
    if factor.numel() == 1:
        return numbers.mul_(factor.view(()))
    factor = factor.view(*scale.shape, *[1] * (len(weight.shape) - len(scale.shape)))
    for dim, block in enumerate(blocks):
        factor = factor.repeat_interleave(block, dim).narrow(dim, 0, weight.shape[dim]) if block > 1 else factor
    return numbers.mul_(factor)
