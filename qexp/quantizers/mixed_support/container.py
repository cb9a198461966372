"""A safetensors file for weights of several formats, which only qexp reads.

Every layer has the tensors of its own format, under that format's names. Other programs must not misread them:
diffusers rejects the quant_method, but transformers ignores an unknown one and fills missing tensors with random
numbers. So `X.weight` of a quantized layer always has a shape that transformers rejects:

    X.weight   the format's tensor of that name with an extra dimension of size 1; if it has none, u8 [1, 1, 1]

GGUF blocks, which have a file format of their own, are stored as u8 [out, bytes of a row, 1].
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from qexp.errors import ConfigError
from qexp.quantizers.base import Quantizer
from qexp.quantizers.layers import paths_above

if TYPE_CHECKING:
    from torch import Tensor

    from qexp.checkpoints.tensor_entry import TensorEntry


def pack(state_dict: Mapping[str, Tensor], layers: Mapping[str, Quantizer]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return (tensors, file metadata) of a model. layers: quantized layer -> its quantizer.

    Raises: ConfigError for a format that cannot be stored.
    """
    of_layer: dict[str | None, dict[str, Tensor]] = {}
    for name, tensor in state_dict.items():
        layer = next((path for path in paths_above(name) if path in layers), None)
        of_layer.setdefault(layer, {})[name] = tensor
    tensors, metadata = dict(of_layer.pop(None, {})), dict[str, str]()
    for layer, own in of_layer.items():
        assert layer is not None
        packed, described = _pack_layer(layer, own, layers[layer])
        tensors |= packed
        metadata |= described
    return tensors, metadata


def _pack_layer(
    layer: str, own: Mapping[str, Tensor], quantizer: Quantizer
) -> tuple[dict[str, Tensor], dict[str, str]]:
    import torch

    if not quantizer.is_serializable:
        raise ConfigError(f"save: {quantizer.quantization_method} of '{layer}' has no file format; dequantize it first")
    tensors, metadata = quantizer.as_safetensors(own)
    weight = f"{layer}.weight"
    if weight in tensors:
        tensors[weight] = tensors[weight][..., None]
    elif any(name.startswith(weight) for name in own):  # not of a layer that shares the weight of another
        tensors[weight] = torch.zeros(1, 1, 1, dtype=torch.uint8)
    return tensors, {weight: metadata[weight]} if weight in metadata else {}


def native_entries(layer: str, entries: Mapping[str, TensorEntry]) -> Mapping[str, TensorEntry]:
    """Return the tensors of a file, with a layer's tensors in their original shapes."""
    weight = entries.get(f"{layer}.weight")
    if weight is None or weight.shape[-1:] != (1,):
        return entries
    return ChainMap({f"{layer}.weight": replace(weight, shape=weight.shape[:-1])}, dict(entries))
