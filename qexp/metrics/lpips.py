"""LPIPS, the learned perceptual distance of two images: 0 for the same, about 0.7 for unrelated ones.

    d(x, y) = sum over taps of mean over positions of sum_c w_c (f_c(x) / |f(x)| - f_c(y) / |f(y)|)^2

f are activations of a classifier (`backbones.py`), w what was learned from people's judgements; torchmetrics brings the
w. The classifiers need some pixels: images whose shorter side is below MIN_SIDE are enlarged by a whole factor, each
pixel to a square.

Source: arXiv:1801.03924, version 0.1 of its weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from typing import TYPE_CHECKING

from qexp.metrics.registry import Metric, Result, Samples

if TYPE_CHECKING:
    from torch import Tensor

    from qexp.metrics.backbones import Backbone

BATCH = 8
MIN_SIDE = 64
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of ImageNet's colours, for values in [-1, 1]


def lpips(images: Tensor, reference: Tensor, backbone: Backbone, heads: Sequence[Tensor]) -> Tensor:
    """Return the distance of each image to its reference, [n], fp32.

    Shapes: images and reference [n, 3, height, width] in [-1, 1]; heads: [1, channels, 1, 1] for each tap.
    """
    import torch

    with torch.no_grad():
        batches = zip(images.split(BATCH), reference.split(BATCH), strict=True)
        return torch.cat([_distance(backbone(_prepared(a)), backbone(_prepared(b)), heads) for a, b in batches])


def heads_of(state: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the learned weights in a file of LPIPS' authors: one for each channel of each tap."""
    return [state[f"lin{number}.model.1.weight"].float() for number in range(5)]


def _prepared(images: Tensor) -> Tensor:
    import torch

    factor = -(-MIN_SIDE // min(images.shape[-2:]))
    images = images.float().repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    shift, scale = (torch.tensor(values).view(1, 3, 1, 1) for values in (SHIFT, SCALE))
    return (images - shift) / scale


def _distance(first: Sequence[Tensor], second: Sequence[Tensor], heads: Sequence[Tensor]) -> Tensor:
    total = first[0].new_zeros(len(first[0]))
    for a, b, weight in zip(first, second, heads, strict=True):
        difference = (_normalize_channels(a) - _normalize_channels(b)).square()  # [n, channels, height, width]
        total += (difference * weight).sum(1).mean((1, 2))
    return total


def _normalize_channels(features: Tensor) -> Tensor:
    """Return each position's channels as a vector of length 1."""
    return features / (features.square().sum(1, keepdim=True) + 1e-8).sqrt()


def _compute(samples: Samples) -> Result:
    from qexp.metrics.tensors import is_finite

    images = samples.outputs["images"]
    reference = None if samples.expected is None else samples.expected["images"]
    if reference is None or not (is_finite(images) and is_finite(reference)):
        return Result(None)
    ours, theirs = (side.float().expand(-1, 3, -1, -1) for side in (images, reference))  # grey ones as RGB
    distances = lpips(ours, theirs, *samples.tools["lpips"]()).double()
    return Result(distances.mean().item(), distances.tolist())


METRICS = (
    Metric(
        "quality/lpips", "LPIPS distance of images to the reference's; 0 is the same",
        header="LPIPS", better="lower", range=(0, inf), tasks=("generate",), mean_over="images", digits=".4f",
        order=60, needs=("images",), compute=_compute, setting="lpips_net",
    ),
)  # fmt: skip
