"""A decoder for each GGUF type that needs no grid: uint8 [blocks, bytes of a block] -> fp32 [blocks, weights].

Legacy types (Qn_0, Qn_1) scale 32 weights by d, and shift them by m or by half the range. K types have 256 weights with
one fp16 scale, and small integer scales (and minima) for each 16 or 32 of them. TQ types are ternary. MXFP4 and NVFP4
hold E2M1 floats with a power of two, or an E4M3 float, for a scale. IQ types, in `iq_decoders.py`, index tables.

Every operation is that of gguf-py's decoder, in fp32, so that the two agree.

Source: https://github.com/ggml-org/ggml (ggml-quants.c) and its Python package, quants.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qexp.quantizers.gguf_blocks.fields import Decoder, bits, cut, half, look_up, scales_and_minima, spread, table


def _unsigned_e4m3(code: int) -> float:
    """Four bits of exponent with bias 7, three of mantissa; 127 is no number, and the top bit is ignored."""
    exponent, mantissa = code >> 3 & 15, code & 7
    if code == 127:
        return 0.0
    return mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)


E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # doubled to be integers; the scales are halved
HALF_E8M0 = tuple(2.0 ** (code - 128) for code in range(256))
HALF_E4M3 = tuple(_unsigned_e4m3(code) / 2 for code in range(256))


def _q4_0(blocks: Tensor) -> Tensor:
    d, low = cut(blocks, 2)
    return spread(low, 16, (0, 4), 15).flatten(1).sub_(8).mul_(half(d))


def _q4_1(blocks: Tensor) -> Tensor:
    d, m, low = cut(blocks, 2, 2)
    return spread(low, 16, (0, 4), 15).flatten(1).mul_(half(d)).add_(half(m))


def _q5_0(blocks: Tensor) -> Tensor:
    d, high, low = cut(blocks, 2, 4)
    return spread(low, 16, (0, 4), 15).flatten(1).add_(bits(high), alpha=16).sub_(16).mul_(half(d))


def _q5_1(blocks: Tensor) -> Tensor:
    d, m, high, low = cut(blocks, 2, 2, 4)
    return spread(low, 16, (0, 4), 15).flatten(1).add_(bits(high), alpha=16).mul_(half(d)).add_(half(m))


def _q8_0(blocks: Tensor) -> Tensor:
    d, values = cut(blocks, 2)
    return values.view(torch.int8) * half(d)


def _q2_k(blocks: Tensor) -> Tensor:
    scales, low, d, dmin = cut(blocks, 16, 64, 2)
    scale, minimum = half(d) * (scales & 15), half(dmin) * (scales >> 4)  # [n, 16]
    values = spread(low, 32, (0, 2, 4, 6), 3).view(-1, 16, 16)
    return values.mul_(scale[..., None]).sub_(minimum[..., None]).flatten(1)


def _q3_k(blocks: Tensor) -> Tensor:
    high, low, scales, d = cut(blocks, 32, 64, 12)
    scale = spread(scales[:, :8], 8, (0, 4), 15).view(-1, 16)
    scale.add_(spread(scales[:, 8:], 4, (0, 2, 4, 6), 3).view(-1, 16), alpha=16).sub_(32).mul_(half(d))
    values = spread(low, 32, (0, 2, 4, 6), 3).view(-1, 8, 32)
    values.add_(spread(high, 32, range(8), 1).view(-1, 8, 32), alpha=4).sub_(4)
    return values.view(-1, 16, 16).mul_(scale[..., None]).flatten(1)


def _q4_k(blocks: Tensor) -> Tensor:
    d, dmin, scales, low = cut(blocks, 2, 2, 12)
    scale, minimum = scales_and_minima(scales)
    values = spread(low, 32, (0, 4), 15).view(-1, 8, 32)
    return values.mul_((half(d) * scale)[..., None]).sub_((half(dmin) * minimum)[..., None]).flatten(1)


def _q5_k(blocks: Tensor) -> Tensor:
    d, dmin, scales, high, low = cut(blocks, 2, 2, 12, 32)
    scale, minimum = scales_and_minima(scales)
    values = spread(low, 32, (0, 4), 15).view(-1, 8, 32)
    values.add_(spread(high, 32, range(8), 1).view(-1, 8, 32), alpha=16)
    return values.mul_((half(d) * scale)[..., None]).sub_((half(dmin) * minimum)[..., None]).flatten(1)


def _q6_k(blocks: Tensor) -> Tensor:
    low, high, scales, d = cut(blocks, 128, 64, 16)
    values = spread(low, 64, (0, 4), 15).view(-1, 8, 32)
    values.add_(spread(high, 32, (0, 2, 4, 6), 3).view(-1, 8, 32), alpha=16).sub_(32)
    scale = half(d) * scales.view(torch.int8)  # [n, 16]
    return values.view(-1, 16, 16).mul_(scale[..., None]).flatten(1)


def _tq1_0(blocks: Tensor) -> Tensor:
    """Five base-3 digits a byte, as a fraction of 256: multiplying by 3 moves the next one above the point."""
    first, second, last, d = cut(blocks, 32, 16, 4)
    powers = table((1, 3, 9, 27, 81), blocks.device, torch.uint8)[:, None]
    parts = [(field[:, None] * powers[:count]).flatten(1) for field, count in ((first, 5), (second, 5), (last, 4))]
    return ((torch.cat(parts, dim=1).short() * 3) >> 8).float().sub_(1).mul_(half(d))


def _tq2_0(blocks: Tensor) -> Tensor:
    low, d = cut(blocks, 64)
    return spread(low, 32, (0, 2, 4, 6), 3).flatten(1).sub_(1).mul_(half(d))


def _mxfp4(blocks: Tensor) -> Tensor:
    exponent, low = cut(blocks, 1)
    return _e2m1(low, 16).view(-1, 32).mul_(look_up(exponent, HALF_E8M0))


def _nvfp4(blocks: Tensor) -> Tensor:
    scales, low = cut(blocks, 4)
    return _e2m1(low, 8).view(-1, 4, 16).mul_(look_up(scales, HALF_E4M3)[..., None]).flatten(1)


def _e2m1(packed: Tensor, group: int) -> Tensor:
    packed = packed.reshape(packed.shape[0], -1, 1, group)
    return look_up(torch.cat([packed & 15, packed >> 4], dim=2), E2M1)  # [n, G, 2, group]


DECODERS: dict[str, Decoder] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0,
    "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
    "TQ1_0": _tq1_0, "TQ2_0": _tq2_0, "MXFP4": _mxfp4, "NVFP4": _nvfp4,
}  # fmt: skip
