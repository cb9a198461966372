"""The quantization formats in numpy, from their published formulas: an implementation to compare the libraries with.

Each function takes a weight [out, in] in fp32 and returns what it becomes after quantizing and dequantizing.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Weight = NDArray[np.float32]


def nf4_code() -> NDArray[np.float64]:
    """Quantiles of the normal distribution, with an exact zero, scaled to [-1, 1]. Source: arXiv:2305.14314, 3."""
    from scipy.stats import norm

    offset = (1 - 1 / 32 + 1 - 1 / 30) / 2  # the mean of the outermost quantiles of its two halves
    positive = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    negative = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    code = np.sort(np.concatenate([positive, [0.0], negative]))
    return code / code.max()


def fp4_code() -> NDArray[np.float64]:
    """Sign, two bits of exponent, one of mantissa, the largest scaled to 1."""
    positive = np.array([0, 0.0625, 2, 3, 4, 6, 8, 12]) / 12
    return np.sort(np.concatenate([positive, -positive[1:]]))


def blockwise_code(weight: Weight, code: NDArray[np.float64], block: int = 64) -> Weight:
    """The nearest code value, in blocks scaled by their absmax."""
    blocks = weight.reshape(-1, block)
    absmax = np.abs(blocks).max(axis=1, keepdims=True)
    middles = ((code[1:] + code[:-1]) / 2).astype(np.float32)
    nearest = np.searchsorted(middles, (blocks / absmax).ravel()).reshape(blocks.shape)
    return (code.astype(np.float32)[nearest] * absmax).reshape(weight.shape)


def symmetric_int8(weight: Weight, largest: float, group: int | None = None) -> Weight:
    """round(w / s) in -128..127 with s = absmax / largest, a scale for each row or group."""
    groups = weight.reshape(-1, group or weight.shape[1])
    scale = np.abs(groups).max(axis=1, keepdims=True) / np.float32(largest)
    return (np.clip(np.rint(groups / scale), -128, 127) * scale).reshape(weight.shape)


def affine(weight: Weight, bits: int, group: int = 128) -> Weight:
    """round((w - min) / s) in 0..2^bits - 1 with s = (max - min) / (2^bits - 1), for each group."""
    groups, levels = weight.reshape(-1, group), 2**bits - 1
    low, high = groups.min(axis=1, keepdims=True), groups.max(axis=1, keepdims=True)
    scale = (high - low) / levels
    return (np.clip(np.rint((groups - low) / scale), 0, levels) * scale + low).reshape(weight.shape)


def round_to_float(x: Weight, mantissa_bits: int, lowest_exponent: int) -> Weight:
    """The nearest float with so many bits after the leading one, subnormals below 2^lowest_exponent."""
    _, exponent = np.frexp(x)  # |x| = m 2^exponent, 1/2 <= m < 1
    step = np.exp2(np.maximum(exponent - 1, lowest_exponent).astype(np.float32) - mantissa_bits)
    return np.rint(x / step) * step


def float8(weight: Weight, mantissa_bits: int, lowest_exponent: int, largest: float) -> Weight:
    """Float8 with a scale a row that puts the row's absmax on the largest value. Source: arXiv:2209.05433."""
    scale = np.abs(weight).max(axis=1, keepdims=True) / np.float32(largest)
    return round_to_float(weight / scale, mantissa_bits, lowest_exponent) * scale


def e4m3(weight: Weight) -> Weight:
    return float8(weight, 3, -6, 448.0)


def e5m2(weight: Weight) -> Weight:
    return float8(weight, 2, -14, 57344.0)


def bf16(x: Weight, rounding: Callable[[Weight], Weight] = np.rint) -> Weight:
    """x in eight bits of significand."""
    step = np.exp2(np.frexp(x)[1].astype(np.float32) - 8)
    return rounding(x / step) * step


def least_squares(groups: Weight, candidates: Iterator[Weight]) -> Weight:
    """For each group (a row of `groups`) the candidate nearest to it, the earlier one of two that are equally near."""
    best = next(candidates)
    for candidate in candidates:
        nearer = np.square(candidate - groups).sum(axis=1) < np.square(best - groups).sum(axis=1)
        best = np.where(nearer[:, None], candidate, best)
    return best


def packed_integers(weight: Weight, bits: int, shrink: Sequence[float], group: int = 64) -> Weight:
    """Affine in groups whose min to max, or the part of it that is best, lies within offset .. offset + levels * scale.

    Offset and scale are bf16, one rounded down and one up.
    """
    groups, levels = weight.reshape(-1, group), 2**bits - 1
    low, high = groups.min(axis=1, keepdims=True), groups.max(axis=1, keepdims=True)

    def candidate(part: float) -> Weight:
        cut = (high - low) * np.float32((1 - part) / 2)
        offset = bf16(low + cut, np.floor)
        scale = bf16((high - cut - offset) / levels, np.ceil)
        return np.clip(np.rint((groups - offset) / scale), 0, levels) * scale + offset

    return least_squares(groups, map(candidate, (1.0, *shrink))).reshape(weight.shape)


def packed_floats(
    weight: Weight, exponent_bits: int, mantissa_bits: int, shrink: Sequence[float] = (), group: int | None = 64
) -> Weight:
    """Floats without infinity or NaN, a bf16 scale for each group that puts its absmax, or a part, on the largest."""
    groups = weight.reshape(-1, group or weight.shape[1])
    absmax, bias = np.abs(groups).max(axis=1, keepdims=True), 2**exponent_bits // 2 - 1
    highest = 2**exponent_bits - 1 - bias
    largest = np.float32(2.0**highest * (2 - 2.0**-mantissa_bits))

    def candidate(part: float) -> Weight:
        scale = bf16(absmax * np.float32(part) / largest)
        return round_to_float(np.clip(groups / scale, -largest, largest), mantissa_bits, 1 - bias) * scale

    return least_squares(groups, map(candidate, (1.0, *shrink))).reshape(weight.shape)


def fp16(x: Weight) -> Weight:
    return x.astype(np.float16).astype(np.float32)


def ggml_8bit(weight: Weight) -> Weight:
    """Q8_0: blocks of 32, round(w / d) in -127..127 with d = absmax / 127, stored in fp16."""
    blocks = weight.reshape(-1, 32)
    d = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    return (np.rint(blocks / d) * fp16(d)).reshape(weight.shape)


def ggml_symmetric(weight: Weight, bits: int) -> Weight:
    """Q4_0, Q5_0: blocks of 32; the weight of largest magnitude, whatever its sign, goes to -2^(bits - 1)."""
    blocks, half = weight.reshape(-1, 32), np.float32(2 ** (bits - 1))
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)
    d = -largest / half
    return (np.clip(np.rint(blocks / d), -half, half - 1) * fp16(d)).reshape(weight.shape)


def ggml_affine(weight: Weight, bits: int) -> Weight:
    """Q4_1, Q5_1: blocks of 32, from their minimum to their maximum; both scale and minimum stored in fp16."""
    blocks, levels = weight.reshape(-1, 32), np.float32(2**bits - 1)
    low, high = blocks.min(axis=1, keepdims=True), blocks.max(axis=1, keepdims=True)
    d = (high - low) / levels
    return (np.clip(np.rint((blocks - low) / d), 0, levels) * fp16(d) + fp16(low)).reshape(weight.shape)


# conf/backend file -> (formula, bits per weight of a 4096 x 4096 layer by hand: values, then scales)
FORMULAS: dict[str, tuple[Callable[[Weight], Weight], float]] = {
    "bitsandbytes": (lambda w: blockwise_code(w, nf4_code()), 4 + 32 / 64),
    "bitsandbytes_nf4_dq": (lambda w: blockwise_code(w, nf4_code()), 4 + 8 / 64 + 32 / (64 * 256)),
    "bitsandbytes_fp4": (lambda w: blockwise_code(w, fp4_code()), 4 + 32 / 64),
    "bitsandbytes_int8": (lambda w: symmetric_int8(w, 127), 8 + 32 / 4096),
    "torchao": (lambda w: symmetric_int8(w, 127.5), 8 + (32 + 8) / 4096),  # a zero point beside each scale
    "torchao_int8dq": (lambda w: symmetric_int8(w, 127.5), 8 + (32 + 8) / 4096),
    "torchao_float8wo": (e4m3, 8 + 32 / 4096),
    "torchao_float8wo_e5m2": (e5m2, 8 + 32 / 4096),
    "quanto": (lambda w: symmetric_int8(w, 127), 8 + 32 / 4096),
    "quanto_int4": (lambda w: affine(w, 4), 4 + 2 * 32 / 128),  # scale and shift
    "quanto_int2": (lambda w: affine(w, 2), 2 + 2 * 32 / 128),
    "quanto_float8": (e4m3, 8 + 32 / 4096),
    "gguf": (ggml_8bit, 8 + 16 / 32),
    "gguf_q5_1": (lambda w: ggml_affine(w, 5), 5 + 2 * 16 / 32),  # scale and minimum
    "gguf_q5_0": (lambda w: ggml_symmetric(w, 5), 5 + 16 / 32),
    "gguf_q4_1": (lambda w: ggml_affine(w, 4), 4 + 2 * 16 / 32),
    "gguf_q4_0": (lambda w: ggml_symmetric(w, 4), 4 + 16 / 32),
    "packed_uint4": (lambda w: packed_integers(w, 4, (0.95, 0.9, 0.85)), 4 + 2 * 16 / 64),  # scale and offset
    "packed_uint3": (lambda w: packed_integers(w, 3, (0.9, 0.8, 0.7)), 3 + 2 * 16 / 64),
    "packed_uint2": (lambda w: packed_integers(w, 2, (0.85, 0.75, 0.65, 0.5)), 2 + 2 * 16 / 64),
    "packed_fp6_e3w2": (lambda w: packed_floats(w, 3, 2), 6 + 16 / 64),
    "packed_fp6_e2w3": (lambda w: packed_floats(w, 2, 3), 6 + 16 / 64),
    "packed_fp5_e2w2": (lambda w: packed_floats(w, 2, 2), 5 + 16 / 64),
    "packed_fp4_e2w1": (lambda w: packed_floats(w, 2, 1, (0.95, 0.9, 0.85)), 4 + 16 / 64),
}
