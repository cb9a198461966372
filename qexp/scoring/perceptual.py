"""What lpips, clip_score and fid need beside the images: networks with the weights that are on this machine.

All run on the CPU, in fp32. A value that is not finite in the images leaves all three undefined.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qexp.config.schema import MetricsConfig
from qexp.errors import LoadError
from qexp.metrics.backbones import Backbone
from qexp.metrics.fid import BATCH
from qexp.metrics.inception import Inception
from qexp.metrics.lpips import heads_of
from qexp.scoring import perceptual_files


def perceptual_tools(metrics: MetricsConfig, images: Tensor, reference: Tensor | None) -> dict[str, Callable[[], Any]]:
    """Return what loads each of them, by the name under which formulas ask for it.

    Shapes: images and reference [n, 1 or 3, height, width] in [-1, 1]. Raises, when called: LoadError for files that
    are missing or damaged.
    """
    return {
        "lpips": lambda: _lpips_network(metrics.lpips_net),
        "clip": lambda: _clip(metrics.clip_model),
        "inception": lambda: _load(Inception().eval(), perceptual_files.inception_file()),
        "pixels": lambda: _pixels(images),
        "real_images": lambda: _real_images(metrics.fid_images, reference),
    }


def _lpips_network(net: str) -> tuple[Backbone, list[Tensor]]:
    backbone: Backbone = _load(Backbone(net).eval(), perceptual_files.backbone_file(net))
    return backbone, heads_of(_state(perceptual_files.heads_file(net)))


def _clip(name: str) -> Any:
    from qexp.models.clip import Clip

    return Clip(perceptual_files.clip_folder(name))


def _real_images(folder: str | None, reference: Tensor | None) -> Iterable[Tensor] | None:
    """Return the images that fid compares with, in batches: those of a folder, or the reference's."""
    if folder is not None:
        return (_opened(path) for path in perceptual_files.image_files(folder))
    return None if reference is None else _pixels(reference).split(BATCH)


def _pixels(images: Tensor) -> Tensor:
    """[-1, 1] -> uint8, as a picture is stored."""
    return ((images.float().expand(-1, 3, -1, -1).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def _opened(path: Path) -> Tensor:
    """Return a picture as uint8 [1, 3, height, width]. Raises: LoadError."""
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
    """Return the tensors in a file of weights. Raises: LoadError."""
    import pickle

    try:
        state: Mapping[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise LoadError(f"'{path}' is no file of weights ({reason}); download it again") from error
    return state


def _load(network: Any, path: Path) -> Any:
    """Give a network its weights. Raises: LoadError."""
    try:
        network.load(_state(path))
        return network
    except (RuntimeError, AttributeError) as error:
        raise LoadError(
            f"'{path}' does not fit {type(network).__name__}: {str(error).splitlines()[0]}; download it again"
        ) from error
