"""The GGUF types that most files are made of, on the CPU by compiled loops: one pass over the bytes.

`decode.py` and `encode.py` take any type on any device, and make an array of every step. Here the scales of
blocks are computed as they are there, and each weight goes from its bits straight into the result. The arithmetic is
the same float32, so the bytes and numbers are, too. Layouts: see the functions of the same names there.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qexp.checkpoints.gguf_types import TYPES
from qexp.quantizers.cpu_kernels.kernels import absmax, narrowed, source_bits, widened
from qexp.quantizers.cpu_kernels.loops import loop
from qexp.quantizers.cpu_kernels.marks import inlined
from qexp.quantizers.gguf_blocks.fields import cut, half, half_bytes, inverse_of, scales_and_minima

BELOW_HALF = np.float32(0.49999997)  # that of `fields.py`; here, since a loop is compiled again when this file changes
THREAD_WEIGHTS = 1 << 18  # of each thread at least: about a millisecond of work
TARGETS = {torch.bfloat16: (torch.int16, np.uint16, 16), torch.float32: (torch.int32, np.uint32, 0)}


def decode(name: str, blocks: Tensor, out: Tensor) -> None:
    """uint8 [n, bytes of a block] -> `out` [n, weights of a block], contiguous; name: in DECODED, dtype: in TARGETS."""
    integers, unsigned, drop = TARGETS[out.dtype]
    target = out.view(integers).numpy().view(unsigned)
    threads = min(torch.get_num_threads(), out.numel() // THREAD_WEIGHTS)  # as PyTorch's own operations: 1 in a loader
    if threads <= 1:
        DECODED[name](blocks, target, drop)
        return
    step = -(-len(blocks) // threads)
    parts = (slice(start, start + step) for start in range(0, len(blocks), step))
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda part: DECODED[name](blocks[part], target[part], drop), parts))


def _decode_q8_0(blocks: Tensor, out: Any, drop: int) -> None:
    _signed_bytes(blocks.numpy(), half(blocks[:, :2]).numpy(), drop, out)


def _decode_q4_0(blocks: Tensor, out: Any, drop: int) -> None:
    _nibbles_around_8(blocks.numpy(), half(blocks[:, :2]).numpy(), drop, out)


def _decode_q4_k(blocks: Tensor, out: Any, drop: int) -> None:
    d, dmin, scales, _ = cut(blocks, 2, 2, 12)
    scale, minimum = scales_and_minima(scales)
    _nibbles_above_minima(blocks.numpy(), (half(d) * scale).numpy(), (half(dmin) * minimum).numpy(), drop, out)


def _decode_q6_k(blocks: Tensor, out: Any, drop: int) -> None:
    _, scales, d = cut(blocks, 192, 16)
    _six_bits(blocks.numpy(), (half(d) * scales.view(torch.int8)).numpy(), drop, out)


DECODED: dict[str, Callable[[Tensor, Any, int], None]] = {
    "Q8_0": _decode_q8_0,
    "Q4_0": _decode_q4_0,
    "Q4_K": _decode_q4_k,
    "Q6_K": _decode_q6_k,
}


def encode(name: str, rows: Tensor) -> Tensor:
    """uint8 [n, bytes of a row] of weights [n, in]; name: of ENCODED. Raises OverflowError as `encode` of
    `encode.py`."""
    kind = TYPES[name]
    source, shift = source_bits(rows)
    blocks = source.reshape(-1, kind.block)
    out = torch.empty(len(blocks), kind.block_bytes, dtype=torch.uint8)
    find, divisor, fill = ENCODED[name]
    found = torch.empty(len(blocks), 1, dtype=torch.float32)
    find(blocks, shift, found.view(-1).numpy())
    d = found / divisor
    out[:, :2] = half_bytes(d)
    fill(blocks, shift, inverse_of(d).numpy(), out.numpy())
    return out.view(len(rows), -1)


@loop
def _signed_bytes(blocks: Any, scale: Any, drop: int, out: Any) -> None:
    for block in range(blocks.shape[0]):
        d = scale[block, 0]
        for at in range(32):
            out[block, at] = narrowed(np.float32(np.int8(blocks[block, 2 + at])) * d, drop)


@loop
def _nibbles_around_8(blocks: Any, scale: Any, drop: int, out: Any) -> None:
    for block in range(blocks.shape[0]):
        d = scale[block, 0]
        for at in range(16):
            both = np.int32(blocks[block, 2 + at])
            out[block, at] = narrowed(np.float32(np.int32((both & 15) - 8)) * d, drop)
            out[block, 16 + at] = narrowed(np.float32(np.int32((both >> 4) - 8)) * d, drop)


@loop
def _nibbles_above_minima(blocks: Any, scale: Any, minimum: Any, drop: int, out: Any) -> None:
    for block in range(blocks.shape[0]):
        for pair in range(4):  # of groups of 32 weights, which share bytes
            d0, m0 = scale[block, 2 * pair], minimum[block, 2 * pair]
            d1, m1 = scale[block, 2 * pair + 1], minimum[block, 2 * pair + 1]
            for at in range(32):
                both = np.int32(blocks[block, 16 + 32 * pair + at])
                out[block, 64 * pair + at] = narrowed(np.float32(np.int32(both & 15)) * d0 - m0, drop)
                out[block, 64 * pair + 32 + at] = narrowed(np.float32(np.int32(both >> 4)) * d1 - m1, drop)


@loop
def _six_bits(blocks: Any, scale: Any, drop: int, out: Any) -> None:
    for block in range(blocks.shape[0]):
        for part in range(2):  # of 128 weights: 64 bytes with four bits of each, 32 with two
            for quarter in range(4):
                low, high = 64 * part + 32 * (quarter & 1), 128 + 32 * part
                for start in (0, 16):  # 16 weights share a scale
                    place = 128 * part + 32 * quarter + start
                    d = scale[block, place // 16]
                    for at in range(start, start + 16):
                        four = np.int32(blocks[block, low + at]) >> np.int32(4 * (quarter >> 1))
                        two = np.int32(blocks[block, high + at]) >> np.int32(2 * quarter)
                        code = np.int32(((four & 15) | ((two & 3) << 4)) - 32)
                        out[block, place - start + at] = narrowed(np.float32(code) * d, drop)


@loop
def _extremes(source: Any, shift: int, out: Any) -> None:
    """The number of largest magnitude of each row, with its sign, the first if there are two."""
    for row in range(source.shape[0]):
        extreme = np.float32(0)
        for column in range(source.shape[1]):
            value = widened(source[row, column], shift)
            if abs(value) > abs(extreme):
                extreme = value
        out[row] = extreme


@loop
def _into_nibbles(source: Any, shift: int, inverse: Any, out: Any) -> None:
    for block in range(source.shape[0]):
        factor = inverse[block, 0]
        for at in range(16):
            low = _nibble(widened(source[block, at], shift) * factor)
            high = _nibble(widened(source[block, 16 + at], shift) * factor)
            out[block, 2 + at] = np.uint8(low | (high << 4))


@inlined
def _nibble(scaled: Any) -> Any:
    return min(np.int32(scaled + np.float32(8.5)), np.int32(15))


@loop
def _into_bytes(source: Any, shift: int, inverse: Any, out: Any) -> None:
    for block in range(source.shape[0]):
        factor = inverse[block, 0]
        for at in range(32):
            scaled = widened(source[block, at], shift) * factor
            rounded = scaled + (BELOW_HALF if scaled > 0 else -BELOW_HALF)  # and its fraction cut off: half away from 0
            out[block, 2 + at] = np.uint8(np.int8(np.int32(rounded)))


ENCODED: dict[str, tuple[Any, int, Any]] = {"Q8_0": (absmax, 127, _into_bytes), "Q4_0": (_extremes, -8, _into_nibbles)}
