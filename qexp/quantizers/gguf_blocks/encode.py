"""fp32 weights to GGUF blocks: fp32 [blocks, weights of a block] -> uint8 [blocks, bytes of a block].

    Q8_0            q = round(w / d), d = max|w| / 127
    Q4_0, Q5_0      q = floor(w / d + 2^(b-1) + 1/2) in 0..2^b - 1, where d puts the weight of largest magnitude,
                    with its sign, on -2^(b-1)
    Q4_1, Q5_1      q = floor((w - min) / d + 1/2), d = (max - min) / (2^b - 1)
    TQ1_0, TQ2_0    q = round(w / d) in -1..1, d = max|w|: for models that were trained ternary
    MXFP4           the nearest E2M1 float, scaled by 2^(floor(log2(max|w|)) - 2)

d and min are then stored in fp16 (MXFP4: the exponent alone). The bytes are those of gguf-py, ties and all: rounding is
half away from zero, and of two weights with the largest magnitude the first counts. (Blocks below 2^-120 excepted:
there gguf-py converts infinities and negative numbers to bytes. They are zeros in fp16, MXFP4 apart.)

Floats are converted by way of int8: torch converts them to uint8 one by one.

Source: https://github.com/ggml-org/ggml (ggml-quants.c) and its Python package, quants.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from qexp.checkpoints.gguf_types import TYPES
from qexp.quantizers.cpu_kernels.readiness import are_ready
from qexp.quantizers.gguf_blocks.fields import BELOW_HALF, half_bytes, inverse_of, table

Encoder = Callable[[Tensor], Tensor]

GATHER_BITS = 0x0102040810204080  # times eight bytes of 0 or 1: their bits come together in the top byte
E2M1_MIDDLES = (0.5, 1.5, 2.5, 3.5, 5.0, 7.0, 10.0)  # between the magnitudes 0 1 2 3 4 6 8 12; a tie goes down


def encode(name: str, rows: Tensor) -> Tensor:
    """Encode weights [n, in] to rows of blocks, uint8 [n, bytes of a row].

    Raises: OverflowError if a block's scale or minimum leaves the range of fp16.
    """
    kind = TYPES[name]
    if rows.device.type == "cpu" and are_ready():
        from qexp.quantizers.gguf_blocks import kernels

        if name in kernels.ENCODED:
            return kernels.encode(name, rows.contiguous())
    blocks = rows.float().reshape(-1, kind.block)
    return ENCODERS[name](blocks).view(rows.shape[0], -1)


def _nibbles(codes: Tensor) -> Tensor:
    """Two to a byte, the second half of a block above the first: uint8 [n, k] -> [n, k / 2]."""
    low, high = codes.chunk(2, dim=1)
    return (low & 15) | (high << 4)


def _fifth_bits(codes: Tensor) -> Tensor:
    """Bit 4 of each code: uint8 [n, 32] -> uint8 [n, 4]."""
    words = (codes >> 4).view(torch.int64)  # [n, 4]
    return (words * GATHER_BITS >> 56).to(torch.uint8)


def _extreme(blocks: Tensor) -> Tensor:
    """Return the weight of largest magnitude with its sign, the first if there are two: [n, k] -> [n, 1]."""
    high, low = blocks.amax(dim=1, keepdim=True), blocks.amin(dim=1, keepdim=True)
    extreme = torch.where(-low > high, low, high)
    tied = (-low == high).flatten().nonzero().flatten()
    if len(tied):
        few = blocks[tied]
        extreme[tied] = few.gather(1, few.abs().argmax(dim=1, keepdim=True))
    return extreme


def _around_zero(blocks: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """(scale as fp16 bytes, codes uint8) of Q4_0 and Q5_0; levels = 2^bits."""
    d = _extreme(blocks) / (-levels // 2)
    codes = (blocks * inverse_of(d)).add_(levels // 2 + 0.5).to(torch.int8).clamp_(max=levels - 1)
    return half_bytes(d), codes.view(torch.uint8)


def _from_minimum(blocks: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """(scale and minimum as fp16 bytes, codes uint8) of Q4_1 and Q5_1."""
    high, low = blocks.amax(dim=1, keepdim=True), blocks.amin(dim=1, keepdim=True)
    d, low = (high - low) / (levels - 1), low + 0.0  # + 0.0: which zero is the minimum of both is left open
    codes = (blocks - low).mul_(inverse_of(d)).add_(0.5).to(torch.int8).clamp_(max=levels - 1)
    return torch.cat([half_bytes(d), half_bytes(low)], dim=1), codes.view(torch.uint8)


def _round_to_codes(blocks: Tensor, d: Tensor) -> Tensor:
    """round(w / d), half away from zero, as int8."""
    scaled = blocks * inverse_of(d)
    return scaled.add_(torch.full_like(d, BELOW_HALF).copysign(scaled)).to(torch.int8)


def _encode_legacy(find: Callable[[Tensor, int], tuple[Tensor, Tensor]], bits: int, blocks: Tensor) -> Tensor:
    """Scales, the fifth bits if there are, then the lower four of each code."""
    scales, codes = find(blocks, 2**bits)
    return torch.cat([scales, *([_fifth_bits(codes)] if bits == 5 else []), _nibbles(codes)], dim=1)


def _encode_q8_0(blocks: Tensor) -> Tensor:
    d = blocks.abs().amax(dim=1, keepdim=True) / 127
    return torch.cat([half_bytes(d), _round_to_codes(blocks, d).view(torch.uint8)], dim=1)


def _ternary(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(scale as fp16 bytes, codes uint8 0..2)."""
    d = blocks.abs().amax(dim=1, keepdim=True)
    return half_bytes(d), _round_to_codes(blocks, d).add_(1).view(torch.uint8)


def _encode_tq1_0(blocks: Tensor) -> Tensor:
    d, codes = _ternary(blocks)
    parts = [  # the digits of a byte lie 32, 16 or 4 weights apart, the most significant first
        _base_3(codes[:, :160].view(-1, 5, 32)),
        _base_3(codes[:, 160:240].view(-1, 5, 16)),
        _base_3(codes[:, 240:].view(-1, 4, 4)),
    ]
    numbers = torch.cat(parts, dim=1)
    return torch.cat([((numbers * 256 + 242) // 243).to(torch.uint8), d], dim=1)


def _base_3(digits: Tensor) -> Tensor:
    """Five digits as a number up to 242, four as one divisible by three: uint8 [n, 4 or 5, k] -> int32 [n, k]."""
    powers = table((81, 27, 9, 3, 1), digits.device, torch.uint8)[: digits.shape[1], None]
    return (digits * powers).sum(dim=1, dtype=torch.int32)


def _encode_tq2_0(blocks: Tensor) -> Tensor:
    d, codes = _ternary(blocks)
    first, second, third, fourth = codes.view(-1, 2, 4, 32).unbind(dim=2)
    return torch.cat([(first | second << 2 | third << 4 | fourth << 6).flatten(1), d], dim=1)


def _encode_mxfp4(blocks: Tensor) -> Tensor:
    largest = blocks.abs().amax(dim=1, keepdim=True)
    exponent = torch.where(largest > 0, largest.log2().floor() + 125, 0).clamp_(min=0)  # of a block of zeros: 0
    magnitudes, unit = blocks.abs(), torch.exp2(exponent - 128)
    codes = torch.zeros(blocks.shape, dtype=torch.uint8, device=blocks.device)
    for middle in E2M1_MIDDLES:
        codes += magnitudes > middle * unit
    codes += ((blocks < 0) & (codes > 0)).to(torch.uint8) << 3
    return torch.cat([exponent.to(torch.uint8), _nibbles(codes)], dim=1)


ENCODERS: dict[str, Encoder] = {
    "Q8_0": _encode_q8_0,
    "Q5_1": partial(_encode_legacy, _from_minimum, 5), "Q5_0": partial(_encode_legacy, _around_zero, 5),
    "Q4_1": partial(_encode_legacy, _from_minimum, 4), "Q4_0": partial(_encode_legacy, _around_zero, 4),
    "MXFP4": _encode_mxfp4, "TQ2_0": _encode_tq2_0, "TQ1_0": _encode_tq1_0,
}  # fmt: skip
