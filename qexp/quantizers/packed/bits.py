"""Unsigned integers of 1 to 8 bits, packed without gaps.

A row of K values is cut into 8 parts of M = ceil(K / 8) values, the last ones filled up with zeros. The 8 values at
place j of the parts form word j of 8 N bits, part 0 in its lowest bits: part i has bits i N to i N + N - 1. Byte b of
the word, the lowest first, is byte b M + j of the packed row, so that a row takes N M bytes, N bits a value:

    3 bits, M = 2      row: a0 a1 b0 b1 c0 c1 d0 d1 e0 e1 f0 f1 g0 g1 h0 h1
    word j             h h h g g g f f | f e e e d d d c | c c b b b a a a     (a = aj and so on, highest bit left)
    packed row         byte 0 of words 0 and 1, byte 1 of both, byte 2 of both

Values that are stored in one sequence would each begin at another bit; here every step is one shift of M bytes that
lie beside each other, which is what processors and GPUs do fast. With 8 bits this is the row itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

PARTS = 8  # values in a word, which then has whole bytes whatever the number of bits


def pack(values: Tensor, bits: int) -> Tensor:
    """Pack rows of integers below 2^bits: uint8 [rows, K] -> uint8 [rows, bits * ceil(K / 8)]."""
    rows, count = values.shape
    size = -(-count // PARTS)
    parts = torch.nn.functional.pad(values, (0, PARTS * size - count)).view(rows, PARTS, size)
    packed = values.new_zeros(rows, bits, size)
    for number in range(PARTS):
        byte, shift = divmod(number * bits, 8)
        packed[:, byte] |= parts[:, number] << shift  # what is shifted beyond the byte is lost
        if shift + bits > 8:
            packed[:, byte + 1] |= parts[:, number] >> (8 - shift)
    return packed.view(rows, bits * size)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return the integers that `pack` packed: uint8 [rows, bits * ceil(count / 8)] -> uint8 [rows, count]."""
    if bits == 8:
        return packed[:, :count]
    rows, size = packed.shape[0], packed.shape[1] // bits
    stored, parts = packed.view(rows, bits, size), packed.new_empty(rows, PARTS, size)
    for number in range(PARTS):
        byte, shift = divmod(number * bits, 8)
        value = stored[:, byte] >> shift
        if shift + bits > 8:
            value |= stored[:, byte + 1] << (8 - shift)
        torch.bitwise_and(value, 2**bits - 1, out=parts[:, number])
    return parts.view(rows, PARTS * size)[:, :count]
