"""NF4 and FP4 blockwise quantization on the CPU: the bytes of bitsandbytes, many times faster.

Each block of consecutive weights is scaled by its absmax to -1..1; each weight becomes the nearest of 16 code values,
two to a byte, the first in the high bits. The library searches the midpoints between the code values for each weight
on its own, and holds it as int32 and int64 on the way. Here all weights are compared with one midpoint after the
other: fifteen vectorized passes over a slice that stays in cache.

The arithmetic is the library's, operation by operation (bitsandbytes 0.50: a full block is multiplied by the
reciprocal of its absmax, a last block that is not full is divided by it), so the bytes are the same, which a test
holds. The passes are numpy's: it compares floats into bytes with vector instructions, which torch does not, and
counting in bytes moves a quarter of the memory that counting in floats would.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

LOWEST_ABSMAX = 1e-38  # what the library divides by in place of an absmax of zero


@dataclass(frozen=True)
class CodeTable:
    """Code values as the search needs them: in rising order, with the index by which each is stored."""

    midpoints: tuple[float, ...]  # 15, rising
    indices: tuple[int, ...]  # 16


def code_table(code: Tensor) -> CodeTable:
    """code: the 16 values [16] that stored indices stand for, float32."""
    order = torch.argsort(code)
    midpoints = (code[order[:-1]] + code[order[1:]]) / 2
    return CodeTable(tuple(midpoints.tolist()), tuple(order.tolist()))


def quantize_4bit(weight: Tensor, table: CodeTable, blocksize: int) -> tuple[Tensor, Tensor]:
    """(packed uint8 [n / 2], absmax float32 [ceil(n / blocksize)]) of n weights on the CPU, n even.

    weight: float32, float16 or bfloat16, of any shape. The absmax of a block that is not finite is not, either.
    """
    flat = weight.reshape(-1).to(torch.float32, copy=True)
    full = flat.numel() // blocksize * blocksize
    absmax = torch.empty(-(-flat.numel() // blocksize), dtype=torch.float32)
    blocks, scratch = flat[:full].view(-1, blocksize), torch.empty_like(flat)
    torch.amax(torch.abs(blocks, out=scratch[:full].view(-1, blocksize)), 1, out=absmax[: len(blocks)])
    blocks.mul_((1.0 / absmax[: len(blocks)].clamp(min=LOWEST_ABSMAX)).unsqueeze(1))
    if full < flat.numel():
        absmax[-1] = flat[full:].abs().max().clamp(min=LOWEST_ABSMAX)
        flat[full:] /= absmax[-1]
    return torch.from_numpy(_pack(_nearest(flat.numpy(), table))), absmax


def _nearest(scaled: Any, table: CodeTable) -> Any:
    """uint8 indices of the code values next to float32 values [n]."""
    found = np.full(scaled.shape, table.indices[0], dtype=np.uint8)
    above = np.empty(scaled.shape, dtype=np.bool_)
    for midpoint, before, after in zip(table.midpoints, table.indices[:-1], table.indices[1:], strict=True):
        np.greater(scaled, np.float32(midpoint), out=above)
        step = above.view(np.uint8)
        if after - before != 1:  # fp4, whose indices do not rise; the sum is right modulo 256
            np.multiply(step, np.uint8((after - before) % 256), out=step)
        np.add(found, step, out=found)
    return found


def _pack(indices: Any) -> Any:
    """Two 4-bit indices to a byte, the first in its high half: uint8 [n] -> [n / 2]."""
    pairs = indices.view(np.uint16)  # the first of a pair is the low byte: a + 256 b, of which 4097 times is in bits 8
    np.multiply(pairs, np.uint16(4097), out=pairs)  # to 15 (a + 256 b + 4096 a + 2^20 b) / 256 = 16 a + b
    np.right_shift(pairs, 8, out=pairs)
    return pairs.astype(np.uint8)
