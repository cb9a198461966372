"""Codes of `codes.py` by compiled loops: the formulas' own operations, group by group, in the first cache.

The codes and parameters equal those of the formulas in PyTorch (a zero may have the other sign), but where two ranges
of a group are equally good to the last bits: there the order counts in which its squared errors are added up.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from qexp.quantizers.cpu_kernels.kernels import as_bits, from_bits, narrowed, source_bits, widened
from qexp.quantizers.cpu_kernels.loops import loop
from qexp.quantizers.cpu_kernels.marks import inlined

FLOAT32_MAX = float(torch.finfo(torch.float32).max)


def encode_integers(weight: Tensor, bits: int, size: int, shrinks: tuple[float, ...]) -> tuple[Tensor, ...]:
    """Encode groups of `size` weights on the CPU: codes uint8 of the weight's shape, scale and offset fp32 [groups]."""
    source, shift = source_bits(weight)
    limit, levels = torch.finfo(weight.dtype).max, 2**bits - 1
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    scale, offset = (torch.empty(weight.numel() // size) for _ in range(2))
    _integers(
        source.reshape(-1), shift, *_room(size), np.float32(levels), np.array((1.0, *shrinks), np.float32),
        np.float32(limit), np.float32(limit / levels), np.float32(FLOAT32_MAX / levels),
        codes.view(-1).numpy(), scale.numpy(), offset.numpy(),
    )  # fmt: skip
    return codes, scale, offset


def encode_floats(
    weight: Tensor, bits: int, mantissa_bits: int, size: int, shrinks: tuple[float, ...]
) -> tuple[Tensor, ...]:
    """Encode groups of `size` weights on the CPU: codes uint8 of the weight's shape, scale fp32 [groups]."""
    source, shift = source_bits(weight)
    largest = 2 - 2.0**-mantissa_bits
    codes, scale = torch.empty(weight.shape, dtype=torch.uint8), torch.empty(weight.numel() // size)
    _floats(
        source.reshape(-1), shift, *_room(size), bits, mantissa_bits, np.float32(largest),
        np.array([shrink / largest for shrink in (1.0, *shrinks)], np.float32),
        np.float32(torch.finfo(weight.dtype).max / largest),
        codes.view(-1).numpy(), scale.numpy(),
    )  # fmt: skip
    return codes, scale


def _room(size: int) -> tuple[Any, Any]:
    """Return room for the weights and errors of a group."""
    return np.empty(size, np.float32), np.empty(size, np.float32)


@loop
def _integers(
    source: Any, shift: int, weights: Any, errors: Any, levels: Any, shrinks: Any,
    limit: Any, limit_step: Any, highest_step: Any, codes: Any, scales: Any, offsets: Any,
) -> None:  # fmt: skip
    size = weights.shape[0]
    half = np.float32(0.5)
    floor = -_below(limit)
    for group in range(scales.shape[0]):
        start = group * size
        low, high = _range(source, shift, start, weights)
        middle, reach = np.float32(low * half + high * half), np.float32(high * half - low * half)
        scale, offset, least = np.float32(0), np.float32(0), np.float32(np.inf)
        for number in range(shrinks.shape[0]):
            bottom, top = low, high
            if number > 0:
                inner = np.float32(reach * shrinks[number])
                bottom, top = np.float32(middle - inner), np.float32(middle + inner)
            tried_offset = max(_below(bottom), floor)
            tried_scale = -min(_below(np.float32(tried_offset / levels - top / levels)), np.float32(0))
            highest = min(np.float32(limit_step - tried_offset / levels), highest_step)
            tried_scale = min(tried_scale, _below(highest))
            error = np.float32(0)
            if shrinks.shape[0] > 1:
                divisor = tried_scale if tried_scale > 0 else np.float32(1)
                for at in range(size):
                    code = _integer(weights[at], tried_offset, divisor, levels)
                    difference = np.float32(np.float32(code * tried_scale) + tried_offset) - weights[at]
                    errors[at] = difference * difference
                error = _sum_by_halves(errors)
            if number == 0 or error < least:
                scale, offset, least = tried_scale, tried_offset, error
        scales[group], offsets[group] = scale, offset
        divisor = scale if scale > 0 else np.float32(1)
        for at in range(size):
            codes[start + at] = np.uint8(np.int32(_integer(weights[at], offset, divisor, levels)))


@loop
def _floats(
    source: Any, shift: int, weights: Any, errors: Any, bits: int, mantissa_bits: int, largest: Any,
    factors: Any, limit: Any, codes: Any, scales: Any,
) -> None:  # fmt: skip
    size = weights.shape[0]
    lowest = np.int32(127 + 2 - 2 ** (bits - 1 - mantissa_bits))  # the exponent field of the lowest normal values
    sign, ceiling = np.int32(1) << np.int32(bits - 1), _below(limit)
    for group in range(scales.shape[0]):
        start = group * size
        low, high = _range(source, shift, start, weights)
        absmax = abs(max(-low, high))  # of zeros 0, whatever their signs
        scale, least = np.float32(0), np.float32(np.inf)
        for number in range(factors.shape[0]):
            nearest = narrowed(np.float32(absmax * factors[number]), 16)
            tried = min(from_bits(np.uint32(nearest << np.uint32(16))), ceiling)
            error = np.float32(0)
            if factors.shape[0] > 1:
                divisor = tried if tried > 0 else np.float32(1)
                for at in range(size):
                    magnitude = abs(_clamped(weights[at] / divisor, largest))
                    rounder = from_bits(np.uint32(_rounder(magnitude, lowest, mantissa_bits)))
                    value = np.float32(np.float32(np.float32(magnitude + rounder) - rounder) * tried)
                    difference = value - abs(weights[at])  # the sign is the weight's
                    errors[at] = difference * difference
                error = _sum_by_halves(errors)
            if number == 0 or error < least:
                scale, least = tried, error
        scales[group] = scale
        divisor = scale if scale > 0 else np.float32(1)
        for at in range(size):
            value = _clamped(weights[at] / divisor, largest)
            magnitude = abs(value)
            rounder = _rounder(magnitude, lowest, mantissa_bits)
            steps = np.int32(as_bits(np.float32(magnitude + from_bits(np.uint32(rounder))))) - rounder
            biased = (rounder >> np.int32(23)) - np.int32(23 - mantissa_bits)
            code = ((biased - lowest) << np.int32(mantissa_bits)) + steps
            codes[start + at] = np.uint8(code + sign if value < 0 else code)


@inlined
def _range(source: Any, shift: int, start: int, weights: Any) -> Any:
    """(lowest, highest) of a group, which is put into `weights` as float32."""
    low, high = np.float32(np.inf), np.float32(-np.inf)
    for at in range(weights.shape[0]):
        weight = widened(source[start + at], shift)
        weights[at] = weight
        low, high = min(low, weight), max(high, weight)
    return low, high


@inlined
def _integer(weight: Any, offset: Any, divisor: Any, levels: Any) -> Any:
    """Return the code of a weight, as float32."""
    step = np.rint(np.float32(np.float32(weight - offset) / divisor))
    return min(max(step, np.float32(0)), levels)


@inlined
def _clamped(value: Any, largest: Any) -> Any:
    return min(max(value, -largest), largest)


@inlined
def _rounder(magnitude: Any, lowest: Any, mantissa_bits: int) -> Any:
    """Return the bits of the power of two whose last bit is worth one step of a magnitude."""
    biased = max(np.int32(as_bits(magnitude) >> np.uint32(23)), lowest)
    return np.int32(biased + np.int32(23 - mantissa_bits)) << np.int32(23)


@inlined
def _below(value: Any) -> Any:
    """Return the largest bf16 number that is not above a float32, as float32."""
    bits = as_bits(value)
    if value < 0:
        bits = np.uint32(bits + np.uint32(0xFFFF))
    return from_bits(np.uint32(bits & np.uint32(0xFFFF0000)))


@inlined
def _sum_by_halves(values: Any) -> Any:
    """Return the sum, added up in halves: many at a time, and close to the exact one. The values are lost."""
    count = values.shape[0]
    while count > 1:
        kept = (count + 1) // 2
        for at in range(count - kept):
            values[at] += values[kept + at]
        count = kept
    return values[0]
