"""Slices of rows: what a kernel gets of a dense weight."""

import pytest
import torch
from torch import Tensor

from qexp.quantizers import base
from qexp.quantizers.base import WeightSpec, row_slices
from tests.backends import CPU


class Logged:
    """Rows that are read when they are asked for, and how many were at a time."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.dtype = weight, weight.dtype
        self.asked: list[tuple[int, int]] = []

    def __getitem__(self, rows: slice) -> Tensor:
        self.asked.append((rows.start, rows.stop))
        return self.weight[rows]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_slices_of_a_transposed_weight_lie_row_by_row(
    stored: torch.dtype, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Casting and moving keep the order of dimensions in memory, and a kernel is given an address alone."""
    monkeypatch.setitem(base.SLICE_WEIGHTS, "cpu", 10 * 24)
    weight = torch.randn(24, 33, generator=torch.Generator().manual_seed(0)).to(stored).t()  # [33, 24]
    parts = [part for _, part in row_slices(WeightSpec("layer", (33, 24), dtype), weight, CPU)]
    assert len(parts) == 4 and all(part.is_contiguous() for part in parts)
    assert torch.equal(torch.cat(parts), weight.to(dtype))


def test_what_is_read_for_an_accelerator_is_read_in_small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """On meta, which has no memory either. A slice of the accelerator's own size would be all 33 rows."""
    monkeypatch.setitem(base.SLICE_WEIGHTS, "cpu", 10 * 24)
    monkeypatch.setitem(base.SLICE_WEIGHTS, "meta", 1 << 24)
    rows, spec = Logged(torch.ones(33, 24)), WeightSpec("layer", (33, 24), torch.bfloat16)
    ((_, part),) = row_slices(spec, rows, torch.device("meta"), check=False)
    assert (part.shape, part.dtype, part.device.type) == ((33, 24), torch.bfloat16, "meta")
    assert rows.asked == [(0, 10), (10, 20), (20, 30), (30, 33)]
