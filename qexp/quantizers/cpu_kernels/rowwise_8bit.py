"""8-bit quantization of row slices on the CPU, with the bytes of the libraries and in a fraction of their time.

w ~ scale * q with one scale a row, or one for each group of a row. bitsandbytes, torchao and quanto differ in how they
round the scale and the quotient. The scales are computed by PyTorch, from the largest magnitudes; those are found, and
the weights are rounded, by compiled loops of one pass each. Every rounding is that of the library.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qexp.quantizers.cpu_kernels import kernels

EPS = torch.finfo(torch.float32).eps  # torchao's lowest scale
MISSING_BITS = {torch.bfloat16: 16, torch.float16: kernels.HALF_SHIFT, torch.float32: 0}  # of the 23 of float32


def absmax(groups: Tensor) -> Tensor:
    """Return the largest magnitude of each row, [n, k] -> [n, 1], in its dtype; not finite if the row is not."""
    source, shift = kernels.source_bits(groups)
    largest = torch.empty(len(groups), 1, dtype=torch.float32)
    kernels.absmax(source, shift, largest.view(-1).numpy())
    return largest.to(groups.dtype)


def llm_int8(part: Tensor, out: Tensor) -> Tensor:
    """Quantize rows [n, k] as bitsandbytes does, from fp16, into `out`, int8 [n, k].

    Returns the absmaxes, float32 [n]: infinite where one of them is.
    """
    largest = absmax(part).half().float()  # rounding keeps the order, so this is the largest after rounding, too
    _round_products(part, 127.0 / largest, out, as_half=part.dtype != torch.float16)
    return largest.squeeze(1)


def torchao_int8(part: Tensor, group_size: int, out: Tensor) -> Tensor:
    """Quantize rows [n, k] as torchao's symmetric int8 into `out`, int8 [n, k].

    Returns the scales, float32 [n, k / group_size].
    """
    groups = part.view(-1, group_size)
    scale = (absmax(groups) / 127.5).clamp_(min=EPS).float()  # the quotient is rounded to the weight's dtype
    _round_products(groups, 1.0 / scale, out.view(-1, group_size))
    return scale.view(len(part), -1)


def quanto_int8(part: Tensor, out: Tensor) -> Tensor:
    """Quantize rows [n, k] as quanto's int8, computed in their own dtype, into `out`, int8 [n, k].

    Returns the scales, [n, 1].
    """
    scale = absmax(part) / 127
    source, shift = kernels.source_bits(part)
    kernels.round_quotients(source, shift, scale.float().view(-1).numpy(), MISSING_BITS[part.dtype], out.numpy())
    return scale


def _round_products(part: Tensor, factors: Tensor, out: Tensor, as_half: bool = False) -> None:
    source, shift = kernels.source_bits(part)
    kernels.round_products(source, shift, factors.view(-1).numpy(), int(as_half), out.numpy())
