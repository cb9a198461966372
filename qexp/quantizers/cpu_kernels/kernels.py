"""The CPU kernels of quantizing, as compiled loops: one pass over the bits of the weights, no temporaries.

PyTorch makes an array of every step of an expression, and its Python calls hold the GIL between them. These loops read
a slice where it was put, in bf16 or float32, keep what they need in registers and the first cache, write into the
result, and hold no GIL, so that workers do not wait for each other (`loops.py`).

A source is given as the unsigned integers that its floats are, `shift` bits below those of float32: uint16 and 16 for
bfloat16, uint32 and 0 for float32. Every operation is IEEE float32, none is fused or reordered, so results are those
of the same operations in PyTorch, bit by bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from qexp.quantizers.cpu_kernels.loops import loop
from qexp.quantizers.cpu_kernels.marks import inlined, use_widest_vectors

MAGNITUDE = np.uint32(0x7FFFFFFF)  # all but the sign
SIGN = np.uint32(0x80000000)
HALF_NORMAL = np.uint32(0x38800000)  # 2^-14, the lowest normal fp16
HALF_OVERFLOW = np.uint32(0x477FF000)  # 65520, from which on fp16 is infinite
INFINITY = np.uint32(0x7F800000)
HALF_SHIFT = 13  # bits of float32 that fp16 has not
LOWEST_ABSMAX = np.float32(1e-38)  # what bitsandbytes divides by in place of an absmax of zero
LOWEST_DIVISOR, HIGHEST_DIVISOR = np.float32(2.0**-100), np.float32(2.0**100)  # whose reciprocals are exact enough
TORCHAO_STEPS = np.float32(127.5)
TORCHAO_EPS = np.float32(np.finfo(np.float32).eps)  # torchao's lowest scale


def source_bits(weights: Tensor) -> tuple[Any, int]:
    """(the bits of contiguous weights on the CPU, their shift), for the kernels; fp16 is made float32 before."""
    if weights.dtype == torch.bfloat16:
        return weights.view(torch.int16).numpy().view(np.uint16), 16
    return weights.float().view(torch.int32).numpy().view(np.uint32), 0


@loop
def absmax(source: Any, shift: int, out: Any) -> None:
    """The largest magnitude of each row, [n, k] -> [n] float32; infinite or NaN if the row is not finite."""
    for row in range(source.shape[0]):
        out[row] = _absmax(source[row], shift)


@loop
def llm_int8_rows(source: Any, shift: int, as_half: int, scales: Any, out: Any) -> None:
    """int8 [n, k] and scales [n] of rows [n, k], as bitsandbytes makes them. as_half: 1 to round the rows to fp16."""
    for row in range(source.shape[0]):
        weights, values = source[row], out[row]
        scale = _half(as_bits(_absmax(weights, shift)))  # rounding keeps the order: the largest after rounding, too
        factor = np.float32(1) / scale * np.float32(127)  # rounded twice, as PyTorch's 127 / scale
        if as_half == 1:
            for column in range(weights.shape[0]):
                values[column] = _int8(_half(_bits(weights[column], shift)) * factor)
        else:
            for column in range(weights.shape[0]):
                values[column] = _int8(widened(weights[column], shift) * factor)
        scales[row] = scale


@loop
def torchao_int8_rows(source: Any, shift: int, drop: int, scales: Any, out: Any) -> None:
    """int8 [n, k] and scales [n] of rows [n, k], as torchao makes them. drop: bits that the weights' dtype lacks."""
    for row in range(source.shape[0]):
        weights, values = source[row], out[row]
        scale = _rounded(_absmax(weights, shift) / TORCHAO_STEPS, drop)
        scale = TORCHAO_EPS if scale < TORCHAO_EPS else scale  # NaN stays
        factor = np.float32(1) / scale
        for column in range(weights.shape[0]):
            values[column] = _int8(widened(weights[column], shift) * factor)
        scales[row] = scale


@loop
def quanto_int8_rows(source: Any, shift: int, drop: int, scales: Any, out: Any) -> None:
    """int8 [n, k] and scales [n] of rows [n, k], as quanto makes them: scale and quotient are rounded to the weights'
    dtype, which lacks `drop` bits; 0 / 0 is 0."""
    for row in range(source.shape[0]):
        weights, values = source[row], out[row]
        scale = _rounded(_absmax(weights, shift) / np.float32(127), drop)
        if drop == 16 and LOWEST_DIVISOR < scale < HIGHEST_DIVISOR:
            # In bf16 the product with the reciprocal rounds as the quotient, which is slower: both are within 2^-22 of
            # a / b, a and b of 8 bits, and c of 9 bits, between two numbers of 8, is at least 1 / (b c) away from it.
            factor = np.float32(1) / scale
            for column in range(weights.shape[0]):
                product = widened(weights[column], shift) * factor
                values[column] = _int8(from_bits(_round_bits(as_bits(product), 16)))
        else:
            for column in range(weights.shape[0]):
                quotient = widened(weights[column], shift) / scale
                values[column] = _int8(from_bits(_round_bits(as_bits(quotient), drop)) if drop else quotient)
        scales[row] = scale


@loop
def nearest_4bit(
    source: Any, shift: int, block: int, midpoints: Any, indices: Any, is_rank: int,
    scaled: Any, codes: Any, pairs: Any, packed: Any, absmaxes: Any,
) -> None:  # fmt: skip
    """Encode blocks of `block` weights [n], scaled by their absmax, by the nearest of 16 values, two to a byte.

    midpoints: 15 float32 between the values, rising. indices: uint8 [16], by which the values are stored; is_rank: 1 if
    they are 0, 1, 2 … 15. scaled, codes: room for whole blocks, float32 and uint8. pairs: the same memory as codes,
    uint16. packed: uint8 [n / 2], the first of a pair in the high bits. absmaxes: float32 [ceil(n / block)]. A full
    block is multiplied by the reciprocal of its absmax, a last one that is not full is divided by it, as bitsandbytes
    does.
    """
    use_widest_vectors()
    m0, m1, m2, m3, m4 = midpoints[0], midpoints[1], midpoints[2], midpoints[3], midpoints[4]
    m5, m6, m7, m8, m9 = midpoints[5], midpoints[6], midpoints[7], midpoints[8], midpoints[9]
    m10, m11, m12, m13, m14 = midpoints[10], midpoints[11], midpoints[12], midpoints[13], midpoints[14]
    for first in range(0, source.shape[0], scaled.shape[0]):  # many blocks, so that constants stay in registers
        held = min(scaled.shape[0], source.shape[0] - first)
        largests = absmaxes[first // block :]
        for number in range((held + block - 1) // block):
            start = number * block
            count = min(block, held - start)
            weights, quotients = source[first + start : first + start + count], scaled[start : start + count]
            largest = _absmax(weights, shift)
            divisor = LOWEST_ABSMAX if largest < LOWEST_ABSMAX else largest  # NaN stays
            if count == block:
                factor = np.float32(1) / divisor
                largests[number] = largest
                for at in range(count):
                    quotients[at] = widened(weights[at], shift) * factor
            else:
                largests[number] = divisor
                for at in range(count):
                    quotients[at] = widened(weights[at], shift) / divisor
        for at in range(held):
            x = scaled[at]
            rank = _add(_add(_add(_add(_add(np.int32(0), x > m0), x > m1), x > m2), x > m3), x > m4)
            rank = _add(_add(_add(_add(_add(rank, x > m5), x > m6), x > m7), x > m8), x > m9)
            rank = _add(_add(_add(_add(_add(rank, x > m10), x > m11), x > m12), x > m13), x > m14)
            codes[at] = np.uint8(rank)
        if is_rank == 0:  # fp4, whose indices do not rise with its values
            for at in range(held):
                codes[at] = indices[codes[at]]
        bytes_ = packed[first // 2 : (first + held) // 2]
        for at in range(held // 2):  # the first of a pair is the low byte
            bytes_[at] = np.uint8((pairs[at] << 4) | (pairs[at] >> 8))


@inlined
def _absmax(weights: Any, shift: int) -> Any:
    top = np.uint32(0)  # without their sign, floats are in the order of their bits; infinity and NaN come last
    for at in range(weights.shape[0]):
        top = max(top, _magnitude(_bits(weights[at], shift)))
    return from_bits(top)


@inlined
def _bits(raw: Any, shift: int) -> Any:
    """Return the bits of the float32 that a number of a source stands for."""
    return np.uint32(np.uint32(raw) << np.uint32(shift))


@inlined
def from_bits(bits: Any) -> Any:
    return np.uint32(bits).view(np.float32)


@inlined
def widened(raw: Any, shift: int) -> Any:
    """Return the float32 that a number of a source stands for."""
    return from_bits(_bits(raw, shift))


@inlined
def as_bits(value: Any) -> Any:
    return np.float32(value).view(np.uint32)


@inlined
def _magnitude(bits: Any) -> Any:
    return np.uint32(bits & MAGNITUDE)


@inlined
def _add(count: Any, condition: Any) -> Any:
    """Return count + 1 where the condition holds, in 32 bits: a vector then has as many counts as floats."""
    return np.int32(count + np.int32(1)) if condition else count


@inlined
def _int8(value: Any) -> Any:
    """Rounded to even and kept in range; NaN is zero."""
    bounded = min(max(np.rint(value), np.float32(-128)), np.float32(127))
    return np.int8(np.int32(bounded if bounded == bounded else np.float32(0)))


@inlined
def _round_bits(bits: Any, drop: int) -> Any:
    """Return the bits of a float32 rounded to even after all but its last `drop` bits."""
    last = np.uint32(np.uint32(bits >> np.uint32(drop)) & np.uint32(1))
    half = np.uint32(np.uint32(np.uint32(1) << np.uint32(drop - 1)) - np.uint32(1))
    kept = np.uint32(~np.uint32(np.uint32(np.uint32(1) << np.uint32(drop)) - np.uint32(1)))
    return np.uint32(np.uint32(bits + half + last) & kept)


@inlined
def _rounded(value: Any, drop: int) -> Any:
    """Return a scale rounded to the dtype that lacks `drop` bits of float32: none, those of bfloat16 or of fp16."""
    if drop == HALF_SHIFT:
        return _half(as_bits(value))
    return from_bits(np.uint32(narrowed(value, drop) << np.uint32(drop)))


@inlined
def narrowed(value: Any, drop: int) -> Any:
    """Return the bits of a float32 without the last `drop`, rounded to even: those of bfloat16 without 16."""
    bits = as_bits(value)
    if drop == 0:
        return bits
    if _magnitude(bits) > INFINITY:
        return np.uint32(np.uint32(0x7FC00000) >> np.uint32(drop))  # NaN, which rounding might turn into a number
    return np.uint32(_round_bits(bits, drop) >> np.uint32(drop))


@inlined
def _half(bits: Any) -> Any:
    """Return the float32 nearest to one in fp16, from its bits; infinite for what is infinite in fp16, or NaN."""
    magnitude = np.uint32(bits & MAGNITUDE)
    normal = _round_bits(magnitude, HALF_SHIFT)
    in_steps = np.float32(from_bits(magnitude) + np.float32(0.75))  # of 2^-24, as fp16 below its normal numbers
    denormal = np.float32(in_steps - np.float32(0.75))
    found = normal if magnitude >= HALF_NORMAL else as_bits(denormal)
    found = found if magnitude < HALF_OVERFLOW else INFINITY
    return from_bits(np.uint32(found | np.uint32(bits & SIGN)))
