"""8-bit quantization of row slices on the CPU, with the bytes of the libraries and in a fraction of their time.

w ~ scale * q with one scale a row, or one for each group of a row. bitsandbytes, torchao and quanto differ in how they
round the scale and the quotient. A compiled loop finds the largest magnitude of a row and rounds the row while it is in
the first cache. Every rounding is that of the library. The scale of a row that is not finite is not, either.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qexp.quantizers.cpu_kernels import kernels

MISSING_BITS = {torch.bfloat16: 16, torch.float16: kernels.HALF_SHIFT, torch.float32: 0}  # of the 23 of float32


def llm_int8(part: Tensor, out: Tensor) -> Tensor:
    """Quantize rows [n, k] as bitsandbytes does, from fp16, into `out`, int8 [n, k].

    Returns the absmaxes, float32 [n]: infinite where one of them is.
    """
    (source, shift), scales = kernels.source_bits(part), torch.empty(len(part))
    kernels.llm_int8_rows(source, shift, int(part.dtype != torch.float16), scales.numpy(), out.numpy())
    return scales


def torchao_int8(part: Tensor, group_size: int, out: Tensor) -> Tensor:
    """Quantize rows [n, k] as torchao's symmetric int8 into `out`, int8 [n, k].

    Returns the scales, float32 [n, k / group_size].
    """
    groups, values = part.view(-1, group_size), out.view(-1, group_size)
    (source, shift), scales = kernels.source_bits(groups), torch.empty(len(groups))
    kernels.torchao_int8_rows(source, shift, MISSING_BITS[part.dtype], scales.numpy(), values.numpy())
    return scales.view(len(part), -1)


def quanto_int8(part: Tensor, out: Tensor) -> Tensor:
    """Quantize rows [n, k] as quanto's int8, computed in their own dtype, into `out`, int8 [n, k].

    Returns the scales, [n, 1], in that dtype.
    """
    (source, shift), scales = kernels.source_bits(part), torch.empty(len(part), 1)
    kernels.quanto_int8_rows(source, shift, MISSING_BITS[part.dtype], scales.view(-1).numpy(), out.numpy())
    return scales.to(part.dtype)
