"""GGUF's IQ types to fp32: weights as entries of tables that were fitted to real models.

IQ1, IQ2 and IQ3 index a grid whose entries are 8 (or 4) weights at once; signs lie apart, as bits or as the number of
one of 128 patterns. IQ4 types index 16 values. Each block of 256 weights (IQ4_NL: 32) has an fp16 scale and integer
scales of its parts. The grids are gguf-py's.

Source: https://github.com/ggml-org/ggml (ggml-quants.c) and its Python package, quants.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qexp.quantizers.gguf_blocks.fields import Decoder, as_type, bits, constant, cut, half, look_up, table

IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
IQ1_DELTA = 0.125


@constant
def _grid(name: str, device: torch.device) -> Tensor:
    """Return the table of a type: fp32 [entries, weights of an entry]."""
    import gguf.quants

    source: Any = getattr(gguf.quants, name)
    source.init_grid()
    return torch.from_numpy(source.grid.reshape(source.grid_shape)).to(device)


@constant
def _sign_patterns(device: torch.device) -> Tensor:
    """fp32 [128, 8] of 1 and -1: seven free signs, and an eighth that makes the number of minuses even."""
    import gguf.quants

    codes = torch.frombuffer(bytearray(gguf.quants.IQ2_XXS.ksigns), dtype=torch.uint8)
    return _signs(codes[:, None]).to(device)  # as a copy from the host it is there, for every stream


def _signs(field: Tensor) -> Tensor:
    """Turn bits, lowest first, into signs: uint8 [n, k] -> fp32 [n, 8 k], 1 is -1."""
    return 1 - 2 * bits(field).float()


def _select(source: Tensor, index: Tensor) -> Tensor:
    """Select entries of a grid: int [n, k] -> fp32 [n, k * weights of an entry]."""
    return source.index_select(0, index.reshape(-1)).view(index.shape[0], -1)


def _shifted(field: Tensor, shifts: tuple[int, ...], mask: int) -> Tensor:
    """Shift each number by each of these places: int [n, k] -> int32 [n, k * len(shifts)]."""
    return (field.int()[..., None] >> table(shifts, field.device, torch.int32) & mask).flatten(1)


def _scale_parts(weights: Tensor, scale: Tensor) -> Tensor:
    """Scale equal parts of a block: [n, 256] times [n, parts]."""
    return weights.view(*scale.shape, -1).mul_(scale[..., None]).flatten(1)


def _unsigned(field: Tensor) -> Tensor:
    """Little-endian 16-bit numbers: uint8 [n, 2 k] -> int32 [n, k]."""
    return as_type(field, torch.int16).int() & 0xFFFF


def _iq2_xxs(blocks: Tensor) -> Tensor:
    d, codes = cut(blocks, 2)
    codes = codes.reshape(-1, 8, 8)  # four grid indices, then four sign patterns of 7 bits and a scale of 4
    words = as_type(codes[..., 4:].flatten(1), torch.int32)  # [n, 8]
    scale = half(d) * (0.5 + (words >> 28 & 15).float()) * 0.25
    signs = _select(_sign_patterns(blocks.device), _shifted(words, (0, 7, 14, 21), 127))
    return _scale_parts(_select(_grid("IQ2_XXS", blocks.device), codes[..., :4].flatten(1).int()), scale).mul_(signs)


def _iq2_xs(blocks: Tensor) -> Tensor:
    d, codes, scales = cut(blocks, 2, 64)
    words = _unsigned(codes)  # [n, 32]: 9 bits of grid index, 7 of sign pattern
    scale = half(d) * (0.5 + _shifted(scales, (0, 4), 15).float()) * 0.25  # [n, 16]
    signs = _select(_sign_patterns(blocks.device), words >> 9)
    return _scale_parts(_select(_grid("IQ2_XS", blocks.device), words & 511), scale).mul_(signs)


def _iq2_s(blocks: Tensor) -> Tensor:
    d, low, signs, high, scales = cut(blocks, 2, 32, 32, 8)
    scale = half(d) * (0.5 + _shifted(scales, (0, 4), 15).float()) * 0.25  # [n, 16]
    index = low.int() | _shifted(high, (0, 2, 4, 6), 3) << 8
    return _scale_parts(_select(_grid("IQ2_S", blocks.device), index), scale).mul_(_signs(signs))


def _iq3_xxs(blocks: Tensor) -> Tensor:
    d, low, rest = cut(blocks, 2, 64)
    words = as_type(rest, torch.int32)  # [n, 8]
    scale = half(d) * (0.5 + (words >> 28 & 15).float()) * 0.5
    signs = _select(_sign_patterns(blocks.device), _shifted(words, (0, 7, 14, 21), 127))
    return _scale_parts(_select(_grid("IQ3_XXS", blocks.device), low.int()), scale).mul_(signs)


def _iq3_s(blocks: Tensor) -> Tensor:
    d, low, high, signs, scales = cut(blocks, 2, 64, 8, 32)
    scale = half(d) * (1 + 2 * _shifted(scales, (0, 4), 15))  # [n, 8]
    index = low.int() | bits(high).int() << 8
    return _scale_parts(_select(_grid("IQ3_S", blocks.device), index), scale).mul_(_signs(signs))


def _iq1_s(blocks: Tensor) -> Tensor:
    d, low, rest = cut(blocks, 2, 32)
    words = _unsigned(rest)  # [n, 8]: three high bits of four indices, a scale of 3 bits, the sign of delta
    scale = half(d) * (2 * (words >> 12 & 7) + 1)
    delta = IQ1_DELTA - 2 * IQ1_DELTA * (words >> 15).float()
    grid = _select(_grid("IQ1_S", blocks.device), low.int() | _shifted(words, (0, 3, 6, 9), 7) << 8)
    return _scale_parts(grid.view(-1, 8, 32).add_(delta[..., None]).flatten(1), scale)


def _iq1_m(blocks: Tensor) -> Tensor:
    low, high, scales = cut(blocks, 32, 16)
    words = _unsigned(scales)  # [n, 4]: four scales of 3 bits, and in the top bits a quarter of the block's own
    nibbles = (words >> 12) << table((0, 4, 8, 12), blocks.device, torch.int32)
    d = nibbles.sum(dim=1, keepdim=True).short().view(torch.float16).float()
    scale = d * (2 * _shifted(words, (0, 3, 6, 9), 7) + 1)  # [n, 16]
    halves = _shifted(high, (0, 4), 15)  # [n, 32]: three high bits of an index, the sign of delta
    delta = IQ1_DELTA - 2 * IQ1_DELTA * (halves >> 3).float()
    grid = _select(_grid("IQ1_M", blocks.device), low.int() | (halves & 7) << 8)
    return _scale_parts(grid.view(-1, 32, 8).add_(delta[..., None]).flatten(1), scale)


def _iq4_nl(blocks: Tensor) -> Tensor:
    d, low = cut(blocks, 2)
    return _iq4(low).mul_(half(d))


def _iq4_xs(blocks: Tensor) -> Tensor:
    d, high, low, codes = cut(blocks, 2, 2, 4)
    scale = _shifted(low, (0, 4), 15) | _shifted(_unsigned(high), tuple(range(0, 16, 2)), 3) << 4  # [n, 8]
    return _scale_parts(_iq4(codes), half(d) * (scale - 32))


def _iq4(packed: Tensor) -> Tensor:
    """Low nibbles of 16 bytes, then their high ones: uint8 [n, 16 k] -> fp32 [n, 32 k]."""
    packed = packed.reshape(packed.shape[0], -1, 1, 16)
    return look_up(torch.cat([packed & 15, packed >> 4], dim=2), IQ4_VALUES).flatten(1)


GRID_DECODERS: dict[str, Decoder] = {
    "IQ1_S": _iq1_s, "IQ1_M": _iq1_m, "IQ2_XXS": _iq2_xxs, "IQ2_XS": _iq2_xs, "IQ2_S": _iq2_s,
    "IQ3_XXS": _iq3_xxs, "IQ3_S": _iq3_s, "IQ4_NL": _iq4_nl, "IQ4_XS": _iq4_xs,
}  # fmt: skip
