"""Packing: the bits lie where the module says, for every width and size, and come back."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qexp.quantizers.packed.bits import pack, unpack

SIZES = [1, 2, 7, 8, 9, 16, 63, 64, 65, 100, 128, 1000]


@st.composite
def rows_of_values(draw: st.DrawFn) -> tuple[Tensor, int]:
    bits, rows = draw(st.integers(1, 8)), draw(st.integers(1, 4))
    count = draw(st.one_of(st.integers(1, 70), st.sampled_from(SIZES)))
    values = np.random.default_rng(draw(st.integers(0, 2**32 - 1))).integers(0, 2**bits, (rows, count), dtype=np.uint8)
    if draw(st.booleans()):
        values[:] = draw(st.sampled_from([0, 2**bits - 1]))
    return torch.from_numpy(values), bits


def packed_by_hand(values: Tensor, bits: int) -> list[list[int]]:
    """As the module's docstring says it: words of 8 values `size` apart, the first one lowest, stored byte by byte."""
    size = (values.shape[1] + 7) // 8
    packed = []
    for row in values.tolist():
        row += [0] * (8 * size - len(row))
        words = [sum(row[part * size + j] << (bits * part) for part in range(8)) for j in range(size)]
        packed.append([(word >> (8 * byte)) & 255 for byte in range(bits) for word in words])
    return packed


@settings(derandomize=True, deadline=None, max_examples=100)
@given(rows_of_values())
def test_bits_lie_where_the_docstring_says_and_come_back(case: tuple[Tensor, int]) -> None:
    values, bits = case
    packed = pack(values, bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == packed_by_hand(values, bits)
    assert torch.equal(unpack(packed, bits, values.shape[1]), values)


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.integers(1, 8), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_every_byte_is_one_of_a_packed_row(bits: int, size: int, seed: int) -> None:
    """Nothing is lost: the bytes that come from unpacking any bytes and packing again are the same."""
    packed = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (3, bits * size), dtype=np.uint8))
    assert torch.equal(pack(unpack(packed, bits, 8 * size), bits), packed)


def test_eight_bits_are_the_bytes_themselves() -> None:
    values = torch.arange(64, dtype=torch.uint8).view(2, 32)
    assert torch.equal(pack(values, 8), values)


def test_a_row_without_its_last_word_is_no_row_of_another_size() -> None:
    """The number of values is not stored, so that unpacking fewer of the same words gives the first ones."""
    values = torch.tensor([[1, 2, 3, 0, 1, 2, 3, 0, 1, 2]], dtype=torch.uint8)
    assert unpack(pack(values, 2), 2, 9).tolist() == [values[0, :9].tolist()]
