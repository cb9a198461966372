"""Quality of images as people, captions and sets of images judge it: lpips, clip_score, fid. On the CPU, in fp32.

    lpips       mean over the images of LPIPS to the reference's image (see `metrics/lpips.py`)
    clip_score  100 times the mean cosine of an image's and its prompt's features in CLIP, not below 0
    fid         Fréchet distance between Inception's features of the images and of the reference's, or of the images in
                a folder. With fewer images than its 2,048 features it is biased upwards: compare sets of one size

The images of a prompt follow one another. A value that is not finite in the images leaves all three undefined.

Sources: arXiv:1801.03924, arXiv:2104.08718 (weight 100 instead of 2.5), arXiv:1706.08500.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qexp.config.schema import PERCEPTUAL_METRICS, MetricsConfig
from qexp.errors import LoadError
from qexp.metrics.backbones import Backbone
from qexp.metrics.frechet import frechet_distance, mean_and_covariance
from qexp.metrics.inception import Inception
from qexp.metrics.lpips import heads_of, lpips
from qexp.metrics.tensors import is_finite
from qexp.scoring import perceptual_files

INCEPTION_BATCH = 16


def perceptual_numbers(
    metrics: MetricsConfig, prompts: Sequence[str] | None, images: Tensor, reference: Tensor | None
) -> dict[str, float | None]:
    """Those of the three that `metrics.names` has; None where one is undefined.

    Shapes: images and reference [n, 1 or 3, height, width] in [-1, 1]. Raises: LoadError for files that are missing.
    """
    wanted = [name for name in PERCEPTUAL_METRICS if name in metrics.names]
    if not is_finite(images) or (reference is not None and not is_finite(reference)):
        return dict.fromkeys(wanted)
    compute = {
        "lpips": lambda: None if reference is None else _lpips(metrics.lpips_net, _rgb(images), _rgb(reference)),
        "clip_score": lambda: None if not prompts else _clip_score(metrics.clip_model, prompts, _pixels(images)),
        "fid": lambda: _fid(metrics.fid_images, images, reference),
    }
    return {name: compute[name]() for name in wanted}


def _lpips(net: str, images: Tensor, reference: Tensor) -> float:
    backbone = Backbone(net).eval()
    _load(backbone, perceptual_files.backbone_file(net))
    heads = heads_of(_state(perceptual_files.heads_file(net)))
    return lpips(images, reference, backbone, heads).double().mean().item()


def _clip_score(name: str, prompts: Sequence[str], images: Tensor) -> float | None:
    from qexp.models.clip import Clip

    if len(images) % len(prompts):
        return None  # nothing says which image is of which prompt
    clip = Clip(perceptual_files.clip_folder(name))
    texts = clip.text_features(list(prompts)).repeat_interleave(len(images) // len(prompts), 0)
    cosines = (clip.image_features(images) * texts).sum(-1)
    return max(100 * cosines.double().mean().item(), 0.0)


def _fid(folder: str | None, images: Tensor, reference: Tensor | None) -> float | None:
    if len(images) < 2 or (folder is None and reference is None):
        return None
    network = Inception().eval()
    _load(network, perceptual_files.inception_file())
    others: Iterable[Tensor] = []
    if folder is not None:
        others = (_opened(path) for path in perceptual_files.image_files(folder))
    elif reference is not None:
        others = _pixels(reference).split(INCEPTION_BATCH)
    with torch.no_grad():
        ours = torch.cat([network(batch) for batch in _pixels(images).split(INCEPTION_BATCH)])
        theirs = torch.cat([network(batch) for batch in others])
    return frechet_distance(*mean_and_covariance(ours), *mean_and_covariance(theirs))


def _rgb(images: Tensor) -> Tensor:
    return images.float().expand(-1, 3, -1, -1)


def _pixels(images: Tensor) -> Tensor:
    """[-1, 1] -> uint8, as a picture is stored."""
    return ((_rgb(images).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def _opened(path: Path) -> Tensor:
    """A picture as uint8 [1, 3, height, width]. Raises: LoadError."""
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            values = np.array(picture.convert("RGB"))
    except (OSError, UnidentifiedImageError) as error:
        raise LoadError(
            f"'{path}' is no image that can be opened ({error}); remove it from metrics.fid_images"
        ) from error
    return torch.from_numpy(values).permute(2, 0, 1)[None]


def _state(path: Path) -> Mapping[str, Tensor]:
    """The tensors in a file of weights. Raises: LoadError."""
    import pickle

    try:
        state: Mapping[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise LoadError(f"'{path}' is no file of weights ({reason}); download it again") from error
    return state


def _load(network: Any, path: Path) -> None:
    """Give a network its weights. Raises: LoadError."""
    try:
        network.load(_state(path))
    except (RuntimeError, AttributeError) as error:
        raise LoadError(
            f"'{path}' does not fit {type(network).__name__}: {str(error).splitlines()[0]}; download it again"
        ) from error
