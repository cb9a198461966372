"""Fréchet distance between two Gaussians, the d² that FID reports:

    d² = |m1 - m2|² + tr(S1) + tr(S2) - 2 tr((S1 S2)^½)

S1 S2 is similar to the symmetric A = S1^½ S2 S1^½, so tr((S1 S2)^½) is the sum of the square roots of A's
eigenvalues: two symmetric eigendecompositions, no general matrix square root, and singular covariances (fewer
samples than features) are no special case. Eigenvalues that rounding made negative count as 0, as does a distance.
With few samples the distance is biased upwards: compare only sets of the same size.

Sources: Dowson and Landau, J. Multivariate Analysis 12 (1982); arXiv:1706.08500 (FID).
"""

import torch
from torch import Tensor


def mean_and_covariance(features: Tensor) -> tuple[Tensor, Tensor]:
    """Sample mean and unbiased covariance in fp64: features [n, dims] -> [dims], [dims, dims]; n >= 2."""
    features = features.double()
    return features.mean(0), features.T.cov()


def frechet_distance(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor) -> float:
    """Squared Fréchet distance of two Gaussians; all values finite, computed in fp64.

    Shapes: means [dims], covariances [dims, dims].
    """
    mean1, covariance1 = mean1.double(), covariance1.double()
    mean2, covariance2 = mean2.double(), covariance2.double()
    values, vectors = torch.linalg.eigh(covariance1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = root @ covariance2 @ root
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance = (mean1 - mean2).square().sum() + covariance1.trace() + covariance2.trace() - 2 * cross
    return max(0.0, float(distance))
