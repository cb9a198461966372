"""Write safetensors files whose tensors are aligned, so that a loader can map them in place of copying them.

The format has no gaps between tensors, so alignment comes from their order: first those with a multiple of 64 bytes,
all of which then begin at one; behind them the rest, the larger elements first. The header is padded with spaces, which
the format allows, and its texts are in order, so that the same tensors are the same bytes.

Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from qexp.checkpoints.dtypes import NAMES
from qexp.errors import ConfigError

ALIGNMENT = 64  # bytes: a cache line, and the widest vector
OUTPUT_NAMES = {**NAMES, torch.complex64: "C64"}  # no checkpoint's, but what a network may return

Described = tuple[str, Sequence[int], int]  # a tensor: safetensors' name of its dtype, its shape, bytes of an element


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors of any device to a file, one of them in CPU memory at a time.

    Raises: ConfigError for a dtype that the format does not have; OSError.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in OUTPUT_NAMES:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise ConfigError(f"'{name}' is {dtype}, which safetensors files do not have; cast it, or leave it out")
    described: dict[str, Described] = {
        name: (OUTPUT_NAMES[tensor.dtype], tuple(tensor.shape), tensor.itemsize) for name, tensor in tensors.items()
    }
    described = order_for_alignment(described)
    with path.open("wb") as stream:
        stream.write(make_header(described, metadata))
        for name in described:
            stream.write(_raw(tensors[name]))


def order_for_alignment(tensors: Mapping[str, Described]) -> dict[str, Described]:
    """Return tensors in the order in which most are aligned."""

    def place(name: str) -> tuple[bool, int, str]:
        return _nbytes(tensors[name]) % ALIGNMENT != 0, -tensors[name][2], name

    return {name: tensors[name] for name in sorted(tensors, key=place)}


def make_header(tensors: Mapping[str, Described], metadata: Mapping[str, str]) -> bytes:
    """Return what stands before the bytes of tensors, in this order: a multiple of 64 bytes."""
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name, one in tensors.items():
        start, end = end, end + _nbytes(one)
        header[name] = {"dtype": one[0], "shape": list(one[1]), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _nbytes(tensor: Described) -> int:
    return tensor[2] * math.prod(tensor[1])


def _raw(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor, in order."""
    with torch._C.DisableTorchFunctionSubclass():  # a parameter of bitsandbytes would move, or look for, its scales
        raw: memoryview = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
    return raw
