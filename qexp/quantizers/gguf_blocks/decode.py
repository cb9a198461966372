"""GGUF blocks to weights, for every type that a file may hold, on any device.

A decoder takes uint8 [blocks, bytes of a block] to fp32 [blocks, weights] (`decoders.py`, `iq_decoders.py`); the result
is cast afterwards. Decoders are elementwise or look tables up, so a tile that stays in the cache costs least, and
results do not depend on tiling. On the CPU, compiled loops decode the types that most files are made of (`kernels.py`).

Source: https://github.com/ggml-org/ggml (ggml-quants.c) and its Python package, quants.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qexp.checkpoints.gguf_types import TYPES
from qexp.quantizers.cpu_kernels.readiness import are_ready
from qexp.quantizers.gguf_blocks.decoders import DECODERS
from qexp.quantizers.gguf_blocks.fields import Decoder

TILE_WEIGHTS = {"cpu": 1 << 19, "cuda": 1 << 24}  # above, caches are missed; below, calls cost more than work


def decode(name: str, rows: Tensor, out: Tensor) -> None:
    """Write the weights of encoded rows, uint8 [n, bytes of a row], into `out` [n, in], in its dtype.

    Raises: NotImplementedError for a type without decoder.
    """
    kind, decoder = TYPES[name], _decoder(name)
    blocks = rows.reshape(-1, kind.block_bytes)
    target = out.view(-1, kind.block)
    if _is_compiled(name, out):
        return gguf_kernels().decode(name, blocks, target)
    step = max(TILE_WEIGHTS.get(rows.device.type, 1 << 19) // kind.block, 1)
    for start in range(0, blocks.shape[0], step):
        target[start : start + step] = decoder(blocks[start : start + step])


def _is_compiled(name: str, out: Tensor) -> bool:
    plain = type(out) is Tensor and out.device.type == "cpu" and not torch.compiler.is_compiling()
    return plain and are_ready() and name in gguf_kernels().DECODED and out.dtype in gguf_kernels().TARGETS


@cache
def gguf_kernels() -> Any:
    """Import the compiled loops, on first use."""
    from qexp.quantizers.gguf_blocks import kernels

    return kernels


def decode_tensor(name: str, raw: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Decode a whole tensor of any dimensions from its bytes in a file, uint8 of any shape."""
    out = torch.empty(*shape, dtype=dtype, device=raw.device)
    decode(name, raw.reshape(-1, TYPES[name].block_bytes), out.view(-1, TYPES[name].block))
    return out


def _decoder(name: str) -> Decoder:
    if name.startswith("IQ"):
        from qexp.quantizers.gguf_blocks.iq_decoders import GRID_DECODERS

        return GRID_DECODERS[name]
    if name not in DECODERS:
        raise NotImplementedError(f"GGUF type {name} cannot be decoded")
    return DECODERS[name]
