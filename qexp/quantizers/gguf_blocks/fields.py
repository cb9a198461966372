"""The fields of GGUF blocks: bytes to numbers and back, and small numbers that share a byte.

Low bits lie together, a byte holding weights that are half (or a quarter of) a group apart; `spread` takes them out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from qexp.system.imports import once

BELOW_HALF = 0.49999997  # the fp32 number before 1/2; adding it and cutting off the fraction rounds half up, exactly
Decoder = Callable[[Tensor], Tensor]


def cut(blocks: Tensor, *sizes: int) -> list[Tensor]:
    """Return the fields of blocks: columns of these sizes, then the rest."""
    return list(blocks.split([*sizes, blocks.shape[1] - sum(sizes)], dim=1))


def as_type(field: Tensor, dtype: torch.dtype) -> Tensor:
    """Return bytes of a field as numbers: uint8 [n, k * size] -> [n, k]."""
    return field.clone(memory_format=torch.contiguous_format).view(dtype)


def half(field: Tensor) -> Tensor:
    """fp16 numbers as fp32."""
    return as_type(field, torch.float16).float()


def spread(packed: Tensor, group: int, shifts: Sequence[int], mask: int) -> Tensor:
    """Small numbers out of bytes: uint8 [n, G * group] -> fp32 [n, G, len(shifts), group]."""
    packed = packed.reshape(packed.shape[0], -1, 1, group)
    out = torch.empty(*packed.shape[:2], len(shifts), group, dtype=torch.float32, device=packed.device)
    for index, shift in enumerate(shifts):
        shifted = packed >> shift if shift else packed
        out[:, :, index : index + 1] = shifted & mask if shift + mask.bit_length() < 8 else shifted
    return out


def bits(field: Tensor) -> Tensor:
    """Unpack bits as numbers, the lowest of each byte first: uint8 [n, k] -> uint8 [n, 8 k] of 0 and 1."""
    table = _bit_table(field.device)
    return table.index_select(0, field.reshape(-1).int()).view(torch.uint8).view(field.shape[0], -1)


def constant(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Remember what a function makes for its arguments: a real tensor, also while something is traced."""

    @once
    def made(*arguments: Any) -> Tensor:
        with _disable_current_modes():
            return make(*arguments)

    return made


@constant
def _bit_table(device: torch.device) -> Tensor:
    """Byte -> its bits in the eight bytes of an int64."""
    values = torch.arange(256)[:, None] >> torch.arange(8) & 1
    # as a copy from the host it is there, for every stream
    return values.to(torch.uint8).view(torch.int64).flatten().to(device)


@constant
def table(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


def look_up(codes: Tensor, values: tuple[float, ...]) -> Tensor:
    """values[codes], of any shape."""
    return table(values, codes.device, torch.float32).index_select(0, codes.reshape(-1).int()).view(codes.shape)


def scales_and_minima(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Eight scales and eight minima of 6 bits: uint8 [n, 12] -> twice uint8 [n, 8].

    The first four bytes hold the low scales, the next four the low minima, each with two high bits of a high one on
    top; the last four hold the low four bits of the high ones.
    """
    scale, minimum, rest = packed.split(4, dim=1)
    return (
        torch.cat([scale & 63, (rest & 15) | ((scale >> 2) & 48)], dim=1),
        torch.cat([minimum & 63, (rest >> 4) | ((minimum >> 2) & 48)], dim=1),
    )


def half_bytes(numbers: Tensor) -> Tensor:
    """fp32 numbers as bytes of fp16: [n, 1] -> uint8 [n, 2]."""
    rounded = numbers.half()
    if bool(rounded.isinf().any()):
        raise OverflowError(f"{numbers.abs().max().item():g} is beyond 65504, the largest fp16 number")
    return rounded.view(torch.uint8)


def inverse_of(d: Tensor) -> Tensor:
    """1 / d; 0 where d is zero, or so small that it will be zero in fp16."""
    inverse = 1 / d
    return inverse.masked_fill_(inverse.isinf(), 0)
