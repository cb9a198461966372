"""GGUF blocks to fp32, for every type that a file may hold: uint8 [blocks, bytes of a block] -> fp32 [blocks, weights].

Legacy types (Qn_0, Qn_1) scale 32 weights by d, and shift them by m or by half the range. K types have 256 weights with
one fp16 scale, and small integer scales (and minima) for each 16 or 32 of them. TQ types are ternary. MXFP4 and NVFP4
hold E2M1 floats with a power of two, or an E4M3 float, for a scale. IQ types, in `iq_decoders.py`, index tables.

Low bits lie together, a byte holding weights that are half (or a quarter of) a group apart; `_spread` takes them out.
Every operation is that of gguf-py's decoder, in fp32, so that the two agree; what comes of it is cast afterwards. It is
all elementwise or table look-up, so a tile that stays in the cache costs least, and results do not depend on tiling.

Source: https://github.com/ggml-org/ggml (ggml-quants.c) and its Python package, quants.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from qexp.checkpoints.gguf_types import TYPES
from qexp.quantizers.base import once

Decoder = Callable[[Tensor], Tensor]

TILE_WEIGHTS = {"cpu": 1 << 19, "cuda": 1 << 24}  # above, caches are missed; below, calls cost more than work


def _unsigned_e4m3(code: int) -> float:
    """Four bits of exponent with bias 7, three of mantissa; 127 is no number, and the top bit is ignored."""
    exponent, mantissa = code >> 3 & 15, code & 7
    if code == 127:
        return 0.0
    return mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)


E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # doubled to be integers; the scales are halved
HALF_E8M0 = tuple(2.0 ** (code - 128) for code in range(256))
HALF_E4M3 = tuple(_unsigned_e4m3(code) / 2 for code in range(256))


def decode(name: str, rows: Tensor, out: Tensor) -> None:
    """Write the weights of encoded rows, uint8 [n, bytes of a row], into `out` [n, in], in its dtype.

    Raises: NotImplementedError for a type without decoder.
    """
    kind, decoder = TYPES[name], _decoder(name)
    blocks = rows.reshape(-1, kind.block_bytes)
    target = out.view(-1, kind.block)
    if _is_compiled(name, out):
        return gguf_kernels().decode(name, blocks, target)
    step = max(TILE_WEIGHTS.get(rows.device.type, 1 << 19) // kind.block, 1)
    for start in range(0, blocks.shape[0], step):
        target[start : start + step] = decoder(blocks[start : start + step])


def _is_compiled(name: str, out: Tensor) -> bool:
    plain = type(out) is Tensor and out.device.type == "cpu" and not torch.compiler.is_compiling()
    return plain and name in gguf_kernels().DECODED and out.dtype in gguf_kernels().TARGETS


@cache
def gguf_kernels() -> Any:
    """The module, which needs this one."""
    from qexp.quantizers.gguf_blocks import kernels as gguf_kernels

    return gguf_kernels


def decode_tensor(name: str, raw: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A whole tensor, of any number of dimensions, from the bytes that a file has for it, uint8 of any shape."""
    out = torch.empty(*shape, dtype=dtype, device=raw.device)
    decode(name, raw.reshape(-1, TYPES[name].block_bytes), out.view(-1, TYPES[name].block))
    return out


def _decoder(name: str) -> Decoder:
    if name.startswith("IQ"):
        from qexp.quantizers.gguf_blocks.iq_decoders import GRID_DECODERS

        return GRID_DECODERS[name]
    if name not in DECODERS:
        raise NotImplementedError(f"GGUF type {name} cannot be decoded")
    return DECODERS[name]


def cut(blocks: Tensor, *sizes: int) -> list[Tensor]:
    """The fields of blocks: columns of these sizes, then the rest."""
    return list(blocks.split([*sizes, blocks.shape[1] - sum(sizes)], dim=1))


def as_type(field: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes of a field as numbers: uint8 [n, k * size] -> [n, k]."""
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
    """Bits as numbers, the lowest of each byte first: uint8 [n, k] -> uint8 [n, 8 k] of 0 and 1."""
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
    return (
        values.to(torch.uint8).view(torch.int64).flatten().to(device)
    )  # as a copy from the host it is there, for every stream


@constant
def table(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


def look_up(codes: Tensor, values: tuple[float, ...]) -> Tensor:
    """values[codes], of any shape."""
    return table(values, codes.device, torch.float32).index_select(0, codes.reshape(-1).int()).view(codes.shape)


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
