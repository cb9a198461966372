"""How far generated images are from the reference's, image against image; values in [-1, 1], so the range is 2.

psnr_db is the mean over the images of 10 log10(2² / mse of the image). Pooling the squared error first (the default
elsewhere) lets one bad image decide: 26.5 dB where the per-image mean is 39.6 dB on the same data. An image that is
identical to its reference has no finite PSNR: the mean is over the others, and None when all are identical.

ssim is the mean of the structural similarity map (torchmetrics, reflection at the borders, in fp64) with a Gaussian
window of sigma 1.5 and 11x11 taps, or of sigma 0.8 and 7x7 taps for images smaller than 16 pixels.

relative_l2 and cosine are over all pixels of all images; see `tensors.py`. With a value that is not finite on
either side every number is None.

Sources: Wang et al., IEEE TIP 13 (2004) (SSIM).
"""

from typing import cast

import torch
from torch import Tensor

from qexp.metrics import tensors

DATA_RANGE = 2.0
SSIM_BATCH = 16  # images at a time: the similarity map needs about 20 fp64 copies of them


def psnr_db(images: Tensor, reference: Tensor) -> float | None:
    """Mean over the images that differ of each one's PSNR; None if there is none, or no number."""
    errors = (images.double() - reference.double()).square().flatten(1).mean(-1)  # [n]
    errors = errors[errors != 0]
    if len(errors) == 0 or not tensors.is_finite(errors):
        return None
    return (10 * (DATA_RANGE**2 / errors).log10()).mean().item()


def ssim(images: Tensor, reference: Tensor) -> float | None:
    """Mean structural similarity: images and reference [n, channels, height, width]."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    if not (tensors.is_finite(images) and tensors.is_finite(reference)):
        return None
    sigma = 1.5 if min(images.shape[-2:]) >= 16 else 0.8
    total = 0.0
    for a, b in zip(torch.split(images, SSIM_BATCH), torch.split(reference, SSIM_BATCH), strict=True):
        values = structural_similarity_index_measure(
            a.double(), b.double(), sigma=sigma, data_range=DATA_RANGE, reduction="none"
        )
        total += float(cast(Tensor, values).sum())
    return total / len(images)


def compare_images(images: Tensor, reference: Tensor) -> dict[str, float | None]:
    """psnr_db, ssim, relative_l2, cosine and exact (1 if every image is identical to its reference).

    Raises: ValueError if there are not as many images of the same size on both sides.
    """
    both = tensors.compare(reference, images)
    return {
        "psnr_db": psnr_db(images, reference),
        "ssim": ssim(images, reference),
        "relative_l2": both.relative_l2,
        "cosine": both.cosine,
        "exact": float(both.exact),
    }
