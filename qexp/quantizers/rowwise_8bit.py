"""8-bit quantization of row slices on the CPU, with the bytes of the libraries and in a fraction of their time.

w ~ scale * q with one scale a row, or one for each group of a row. bitsandbytes, torchao and quanto differ in how they
round the scale and the quotient, and spend most of their time on operations that PyTorch does not vectorize: a maximum
with its index, minima and maxima of 16-bit floats, casts from bf16 to fp16. Here the largest magnitude is found among
the bits of the numbers, as integers, and the rest happens in place; every rounding is that of the library.
"""

from __future__ import annotations

import torch
from torch import Tensor

INTEGERS = {2: torch.int16, 4: torch.int32}  # bytes of a float -> the integers that its bits are
EPS = torch.finfo(torch.float32).eps  # torchao's lowest scale


def absmax(groups: Tensor) -> Tensor:
    """The largest magnitude of each row, [n, k] -> [n, 1], in its dtype; not finite if the row is not.

    Without their sign bits, floats are in the order of the integers that they are; infinity and NaN come last.
    """
    if groups.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return groups.abs().amax(dim=1, keepdim=True)
    integers = INTEGERS[groups.itemsize]
    bits = groups.view(integers) & torch.iinfo(integers).max
    return bits.amax(dim=1, keepdim=True).view(groups.dtype)


def llm_int8(part: Tensor) -> tuple[Tensor, Tensor]:
    """bitsandbytes' (values int8 [n, k], absmaxes float32 [n]) of rows in fp16."""
    largest = absmax(part).float()
    scaled = part.float().mul_(127.0 / largest)
    return scaled.round_().to(torch.int8), largest.squeeze(1)


def torchao_int8(part: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """torchao's symmetric (values int8 [n, k], scales float32 [n * k / group_size, 1])."""
    groups = part.reshape(-1, group_size)
    scale = (absmax(groups) / 127.5).clamp_(min=EPS).float()  # the quotient is rounded to the weight's dtype
    scaled = groups.to(torch.float32, copy=True).mul_(1.0 / scale)
    return scaled.round_().clamp_(-128, 127).to(torch.int8).view(part.shape), scale


def quanto_int8(part: Tensor) -> tuple[Tensor, Tensor]:
    """quanto's (values int8 [n, k], scales [n, 1]), computed in the weight's own dtype."""
    scale = absmax(part) / 127
    return (part / scale).round_().clamp_(-128, 127).to(torch.int8), scale
