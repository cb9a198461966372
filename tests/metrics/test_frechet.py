import numpy as np
import pytest
import torch
from torch import Tensor

from qexp.metrics.frechet import frechet_distance, mean_and_covariance


def scipy_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The formula with a general matrix square root of S1 S2."""
    import scipy.linalg

    s1, s2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(s1 @ s2).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * np.trace(root))


def distance(a: Tensor, b: Tensor) -> float:
    return frechet_distance(*mean_and_covariance(a), *mean_and_covariance(b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_agrees_with_scipy(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    a = torch.randn(300, 16, dtype=dtype) @ torch.randn(16, 16, dtype=dtype)
    b = torch.randn(200, 16, dtype=dtype) @ torch.randn(16, 16, dtype=dtype) + 0.5
    assert distance(a, b) == pytest.approx(scipy_distance(a.double().numpy(), b.double().numpy()), rel=1e-9)


def test_one_dimension_by_hand() -> None:
    # (m1 - m2)² + (s1 - s2)² = 3² + (2 - 5)² = 18
    one = [torch.tensor(values) for values in ([1.0], [[4.0]], [4.0], [[25.0]])]
    assert frechet_distance(*one) == pytest.approx(18)


def test_distance_of_a_set_to_itself_is_zero() -> None:
    torch.manual_seed(0)
    features = torch.randn(50, 8).relu()
    assert distance(features, features) == pytest.approx(0, abs=1e-6) and distance(features, features) >= 0


def test_singular_covariances_agree_with_the_nuclear_norm() -> None:
    # With S1 = A Aᵀ and S2 = B Bᵀ, tr((S1 S2)^½) is the sum of the singular values of Aᵀ B.
    torch.manual_seed(0)
    for _ in range(10):
        a, b = torch.randn(5, 16).double().numpy(), torch.randn(7, 16).double().numpy()
        factor_a, factor_b = (
            (features - features.mean(0)).T / np.sqrt(len(features) - 1) for features in (a, b)
        )  # [16, samples]
        cross = np.linalg.norm(factor_a.T @ factor_b, "nuc")
        expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + (factor_a**2).sum() + (factor_b**2).sum() - 2 * cross
        assert distance(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(expected, abs=1e-5)


def test_fewer_samples_than_features() -> None:
    # Rank-deficient covariances on orthogonal axes share nothing, so the cross term is 0:
    # |m1 - m2|² + tr S1 + tr S2, with variances 2 (of -1, 1) and 8 (of -2, 2) and equal means.
    a, b = torch.zeros(2, 6), torch.zeros(2, 6)
    a[:, 0] = torch.tensor([-1.0, 1.0])
    b[:, 1] = torch.tensor([-2.0, 2.0])
    assert distance(a, b) == pytest.approx(10)
