"""FID: the Fréchet distance between Inception's features of the images and of the reference's, or of a folder's.

With fewer images than its 2,048 features it is biased upwards: compare only values with the same n.

Source: arXiv:1706.08500.
"""

from __future__ import annotations

from math import inf

from qexp.metrics.registry import Metric, Samples

BATCH = 16


def _compute(samples: Samples) -> float | None:
    import torch

    from qexp.metrics.frechet import frechet_distance, mean_and_covariance
    from qexp.metrics.tensors import is_finite

    images = samples.outputs["images"]
    reference = None if samples.expected is None else samples.expected["images"]
    broken = not is_finite(images) or (reference is not None and not is_finite(reference))
    others = samples.tools["real_images"]()
    if broken or len(images) < 2 or others is None:
        return None
    network = samples.tools["inception"]()
    with torch.no_grad():
        ours = torch.cat([network(batch) for batch in samples.tools["pixels"]().split(BATCH)])
        theirs = torch.cat([network(batch) for batch in others])
    return frechet_distance(*mean_and_covariance(ours), *mean_and_covariance(theirs))


METRICS = (
    Metric(
        "quality/fid", "Fréchet distance in Inception's features, to the reference's images or a folder's",
        header="FID", better="lower", range=(0, inf), tasks=("generate",), set_of="images", order=62,
        needs=("images",), compute=_compute, setting="fid_images",
    ),
)  # fmt: skip
