import math

import numpy as np
import pytest
import torch
from torch import Tensor

from qexp.metrics import tensors
from qexp.metrics.tensors import Comparison, compare


def test_numbers_by_hand() -> None:
    # Σ a² = 25, Σ (a - b)² = 1, Σ b² = 34, Σ ab = 29
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 5.0])
    found = compare(a, b)
    assert found.sqnr_db == pytest.approx(13.9794, abs=1e-4)  # 10 log10(25)
    assert found.relative_l2 == pytest.approx(0.2)
    assert found.cosine == pytest.approx(29 / (5 * math.sqrt(34)))
    assert found.max_abs_error == 1.0


def numpy_comparison(original: Tensor, restored: Tensor) -> Comparison:
    a, b = (tensor.float().numpy().astype(np.float64) for tensor in (original, restored))
    norm = np.linalg.norm(a.ravel())
    relative = np.linalg.norm((a - b).ravel()) / norm
    return Comparison(
        exact=False,
        finite=True,
        sqnr_db=-20 * np.log10(relative),
        relative_l2=relative,
        cosine=a.ravel() @ b.ravel() / norm / np.linalg.norm(b.ravel()),
        max_abs_error=np.abs(a - b).max(),
    )


def assert_close(ours: Comparison, theirs: Comparison) -> None:
    assert (ours.exact, ours.finite) == (theirs.exact, theirs.finite)
    for name in ("sqnr_db", "relative_l2", "cosine", "max_abs_error"):
        assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=1e-9), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,), (7, 13), (3, 5, 64, 33)])
def test_agrees_with_numpy(dtype: torch.dtype, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "CHUNK_ELEMENTS", 1000)  # so that even small tensors take several chunks
    torch.manual_seed(0)
    original = torch.randn(shape)
    restored = (original + 0.1 * torch.randn(shape)).to(dtype)
    assert_close(compare(original, restored), numpy_comparison(original, restored))


def test_strided_and_contiguous_tensors_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "CHUNK_ELEMENTS", 1000)
    torch.manual_seed(0)
    original = torch.randn(70, 130).T
    restored = original.contiguous() + 0.1
    assert_close(compare(original, restored), numpy_comparison(original, restored))


def test_scratch_is_a_chunk_and_not_a_layer() -> None:
    layer = torch.zeros(1).expand(4096, 4096)  # no memory behind it, and not contiguous
    column = torch.zeros(4 * tensors.CHUNK_ELEMENTS + 1)
    for tensor in (layer, column):
        pieces = [a.numel() for a, _ in tensors._matching_pieces(tensor, tensor)]
        assert max(pieces) <= tensors.CHUNK_ELEMENTS and sum(pieces) == tensor.numel()


def test_sums_do_not_lose_bits_over_many_elements() -> None:
    # In fp32 a sum of ones stops at 2^24; the 2^24 + 1000 elements here are each off by half.
    original = torch.ones(2**24 + 1000, dtype=torch.bfloat16)
    assert compare(original, original / 2).relative_l2 == 0.5


def test_bf16_rounding_of_gaussian_weights() -> None:
    weight = torch.randn(2048, 1024, generator=torch.Generator().manual_seed(0))
    sqnr = compare(weight, weight.bfloat16()).sqnr_db
    # 8 significant bits: for log-uniform mantissas the error is x² u² / 3 with u in [2^-9, 2^-8] -> about 55.6 dB
    assert sqnr == pytest.approx(55.59, abs=0.03)


@pytest.mark.parametrize("shape", [(3, 4), (0,), (0, 5), ()])
def test_equal_tensors_are_exact(shape: tuple[int, ...]) -> None:
    exact = Comparison(exact=True, finite=True, sqnr_db=None, relative_l2=0.0, cosine=1.0, max_abs_error=0.0)
    tensor = torch.randn(shape)
    assert compare(tensor, tensor.clone()) == exact
    assert compare(torch.zeros(shape), torch.zeros(shape)) == exact


def test_zeros_on_one_side() -> None:
    zeros, ones = torch.zeros(4), torch.ones(4)
    assert compare(zeros, ones) == Comparison(False, True, None, None, 0.0, 1.0)
    assert compare(ones, zeros) == Comparison(False, True, 0.0, 1.0, 0.0, 1.0)  # the error is the whole signal


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("sides", ["original", "restored", "both"])
@pytest.mark.parametrize("position", [0, 2999])
def test_values_that_are_not_finite(value: float, sides: str, position: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "CHUNK_ELEMENTS", 1000)
    original, restored = torch.ones(3000), torch.ones(3000)
    if sides != "restored":
        original[position] = value
    if sides != "original":
        restored[position] = value
    assert compare(original, restored) == Comparison(exact=False, finite=False)


def test_cosine_stays_within_its_bounds() -> None:
    torch.manual_seed(0)
    for _ in range(100):  # rounding takes some of them past 1
        tensor = torch.rand(10)
        for factor in (4.0, -0.5):
            cosine = compare(tensor, tensor * factor).cosine
            assert cosine is not None and abs(cosine) <= 1 and cosine == pytest.approx(math.copysign(1, factor))


def test_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(3, 2\)"):
        compare(torch.zeros(2, 3), torch.zeros(3, 2))
