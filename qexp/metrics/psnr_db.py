"""PSNR: the mean over the images of 10 log10(2² / mse of the image); values in [-1, 1], so the range is 2.

Pooling the squared error first (the default elsewhere) lets one bad image decide: 26.5 dB where the per-image mean is
39.6 dB on the same data. An image that is identical to its reference has no finite PSNR: the mean is over the others,
and None when all are identical, or when a value is not finite.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from qexp.metrics.registry import Metric, Result, Samples

if TYPE_CHECKING:
    from torch import Tensor

DATA_RANGE = 2.0


def psnr_db(images: Tensor, reference: Tensor) -> Result:
    """Return the mean of each image's PSNR: images and reference [n, channels, height, width]."""
    from qexp.metrics.tensors import is_finite

    if images.shape != reference.shape:  # shapes may not broadcast
        raise ValueError(f"cannot compare shapes {tuple(images.shape)} and {tuple(reference.shape)}")
    errors = (images.double() - reference.double()).square().flatten(1).mean(-1)  # [n]
    if not is_finite(errors):
        return Result(None)
    differing = errors[errors != 0]
    each = 10 * (DATA_RANGE**2 / differing).log10()
    values = iter(each.tolist())
    samples = [next(values) if error else math.inf for error in errors.tolist()]
    count = {"quality/differing_images": float(len(differing))}
    return Result(each.mean().item() if len(each) else None, samples, count)


def _compute(samples: Samples) -> Result:
    assert samples.expected is not None
    return psnr_db(samples.outputs["images"], samples.expected["images"])


METRICS = (
    Metric(
        "quality/psnr_db", "PSNR of images against the reference's; null and `quality/exact` 1: identical",
        header="PSNR dB", unit="dB", better="higher", tasks=("generate",), mean_over="differing_images", order=10,
        axis="PSNR against the unquantized model (dB)", brief="psnr {:.1f} dB", needs=("images",), compares=True,
        compute=_compute, infinite_if=("quality/exact", 1),
    ),
    Metric(
        "quality/differing_images", "images that are not identical to the reference's: the n of PSNR",
        range=(0, float("inf")), tasks=("generate",), digits=".0f", order=910,
    ),
)  # fmt: skip
