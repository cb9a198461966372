"""SSIM: the mean of the structural similarity map (torchmetrics, reflection at the borders, in fp64).

The window is Gaussian, of sigma 1.5 and 11x11 taps, or of sigma 0.8 and 7x7 taps for images smaller than 16 pixels.
None with a value that is not finite. Values are in [-1, 1], so the range is 2.

Source: Wang et al., IEEE TIP 13 (2004).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from qexp.metrics.psnr_db import DATA_RANGE
from qexp.metrics.registry import Metric, Result, Samples

if TYPE_CHECKING:
    from torch import Tensor

BATCH = 16  # images at a time: the similarity map needs about 20 fp64 copies of them


def ssim(images: Tensor, reference: Tensor) -> Result:
    """Return the mean structural similarity: images and reference [n, channels, height, width]."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    from qexp.metrics.tensors import is_finite

    if not (len(images) and is_finite(images) and is_finite(reference)):
        return Result(None)
    sigma = 1.5 if min(images.shape[-2:]) >= 16 else 0.8
    total, samples = 0.0, list[float]()
    for a, b in zip(images.split(BATCH), reference.split(BATCH), strict=True):
        found = structural_similarity_index_measure(
            a.double(), b.double(), sigma=sigma, data_range=DATA_RANGE, reduction="none"
        )
        values = cast("Tensor", found)
        total += float(values.sum())
        samples += values.flatten().tolist()
    return Result(total / len(images), samples)


def _compute(samples: Samples) -> Result:
    assert samples.expected is not None
    return ssim(samples.outputs["images"], samples.expected["images"])


METRICS = (
    Metric(
        "quality/ssim", "structural similarity of images to the reference's",
        header="SSIM", better="higher", range=(-1, 1), tasks=("generate",), mean_over="images", digits=".4f", order=20,
        needs=("images",), compares=True, compute=_compute, is_minor=True,
    ),
)  # fmt: skip
