"""GGUF blocks to fp32, for every type that a file may hold: uint8 [blocks, bytes of a block] -> fp32 [blocks, weights].

Legacy types (Qn_0, Qn_1) scale 32 weights by d, and shift them by m or by half the range. K types have 256 weights with
one fp16 scale, and small integer scales (and minima) for each 16 or 32 of them. TQ types are ternary. MXFP4 and NVFP4
hold E2M1 floats with a power of two, or an E4M3 float, for a scale. IQ types, in `iq_decoders.py`, index tables.

Low bits lie together, a byte holding weights that are half (or a quarter of) a group apart; `_spread` takes them out.
Every operation is that of gguf-py's decoder, in fp32, so that the two agree; what comes of it is cast afterwards. It is
all elementwise or table look-up, so a tile that stays in the cache costs least, and results do not depend on tiling.

Source: https://github.com/ggml-org/ggml (ggml-quants.c) and its Python package, quants.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qexp.checkpoints.gguf_types import TYPES
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
    return plain and name in gguf_kernels().DECODED and out.dtype in gguf_kernels().TARGETS


@cache
def gguf_kernels() -> Any:
    """The module, which needs this one."""
    from qexp.quantizers.gguf_blocks import kernels as gguf_kernels

    return gguf_kernels


def decode_tensor(name: str, raw: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A whole tensor, of any number of dimensions, from the bytes that a file has for it, uint8 of any shape."""
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
