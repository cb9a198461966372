"""SSIM: the mean of the structural similarity map, with reflected borders, in fp64, as torchmetrics computes it.

    SSIM(x, y) = (2 mx my + c1) (2 cov + c2) / ((mx² + my² + c1) (vx + vy + c2))

mx, my, vx, vy and cov are means, variances and covariance in a Gaussian window around each pixel: sigma 1.5 and 11x11
taps, or sigma 0.8 and 7x7 taps for images smaller than 16 pixels. Values are in [-1, 1], so the range L is 2;
c1 = (0.01 L)², c2 = (0.03 L)². None with a value that is not finite, and for images with a side of less than 4 pixels,
which the window's border does not fit into.

Source: Wang et al., IEEE TIP 13 (2004).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qexp.metrics.psnr_db import DATA_RANGE
from qexp.metrics.registry import Metric, Result, Samples

if TYPE_CHECKING:
    from torch import Tensor

BATCH_ELEMENTS = 1 << 20  # at a time, but one image at least: the similarity map needs about 20 fp64 copies of them
C1, C2 = (0.01 * DATA_RANGE) ** 2, (0.03 * DATA_RANGE) ** 2


def ssim(images: Tensor, reference: Tensor) -> Result:
    """Return the mean structural similarity: images and reference [n, channels, height, width]."""
    from qexp.metrics.tensors import is_finite

    if images.shape != reference.shape:  # shapes may not broadcast
        raise ValueError(f"cannot compare shapes {tuple(images.shape)} and {tuple(reference.shape)}")
    sigma = 1.5 if min(images.shape[-2:]) >= 16 else 0.8
    radius = int(3.5 * sigma + 0.5)
    if not (len(images) and min(images.shape[-2:]) > radius and is_finite(images) and is_finite(reference)):
        return Result(None)
    count = max(1, BATCH_ELEMENTS // images[0].numel())
    batches = zip(images.split(count), reference.split(count), strict=True)
    samples = [value for a, b in batches for value in _similarities(a.double(), b.double(), sigma, radius).tolist()]
    return Result(sum(samples) / len(samples), samples)


def _similarities(x: Tensor, y: Tensor, sigma: float, radius: int) -> Tensor:
    """Return the SSIM of each image, [n]: x and y [n, channels, height, width] in fp64."""
    import torch
    from torch.nn.functional import pad

    window = torch.exp(-((torch.arange(-radius, radius + 1, dtype=x.dtype) / sigma) ** 2) / 2)
    taps = (window / window.sum()).tolist()
    x, y = (pad(side, [radius] * 4, mode="reflect") for side in (x, y))
    mx, my, xx, yy, xy = (_blur(values, taps) for values in (x, y, x * x, y * y, x * y))
    vx, vy = ((square - mean**2).clamp(min=0) for square, mean in ((xx, mx), (yy, my)))  # rounding may leave -1e-17
    map_ = (2 * mx * my + C1) * (2 * (xy - mx * my) + C2) / ((mx**2 + my**2 + C1) * (vx + vy + C2))
    return map_.flatten(1).mean(1)


def _blur(values: Tensor, taps: list[float]) -> Tensor:
    """Weigh the neighbours along both axes: [..., height, width] shrinks by len(taps) - 1 in either.

    One axis after the other, in place of a convolution with the window, which torch unfolds into len(taps)² copies.
    """
    for axis in (-2, -1):
        length = values.shape[axis] - len(taps) + 1
        total = taps[0] * values.narrow(axis, 0, length)
        for place, tap in enumerate(taps[1:], 1):
            total.add_(values.narrow(axis, place, length), alpha=tap)
        values = total
    return values


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
