"""Slices of rows: what a kernel gets of a dense weight."""

import pytest
import torch

from qexp.quantizers.rows import SLICE_WEIGHTS, WeightSpec, row_slices
from tests.backends import CPU


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_slices_of_a_transposed_weight_lie_row_by_row(
    stored: torch.dtype, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Casting and moving keep the order of dimensions in memory, and a kernel is given an address alone."""
    monkeypatch.setitem(SLICE_WEIGHTS, "cpu", 10 * 24)
    weight = torch.randn(24, 33, generator=torch.Generator().manual_seed(0)).to(stored).t()  # [33, 24]
    parts = [part for _, part in row_slices(WeightSpec("layer", (33, 24), dtype), weight, CPU)]
    assert len(parts) == 4 and all(part.is_contiguous() for part in parts)
    assert torch.equal(torch.cat(parts), weight.to(dtype))
