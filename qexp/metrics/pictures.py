"""Sheets of small images as PNG: a title, a row of column names, and the images in reading order below.

Pixels are enlarged without smoothing. A pixel that is not finite is magenta, so that an overflow is seen at once.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qexp.sweep.store import write_bytes

if TYPE_CHECKING:
    from PIL import Image

COLUMNS = 10
MAX_IMAGES = 100
MIN_SIDE = 32  # smaller images are enlarged by a whole factor to at least this many pixels
GAP = 4
TITLE_HEIGHT = 16
BACKGROUND, INK, NOT_FINITE = (255, 255, 255), (40, 40, 40), (255, 0, 255)


def sheet(values: Tensor, title: str, names: list[str]) -> Image.Image:
    """The first 100 images on one sheet: values [n, 1 or 3, height, width] in [0, 1]; names of the columns."""
    from PIL import Image, ImageDraw

    values = values[:MAX_IMAGES]
    scale = -(-MIN_SIDE // min(values.shape[-2:]))
    pixels = _rgb(values).repeat_interleave(scale, 1).repeat_interleave(scale, 2)  # [n, height, width, 3]
    height, width = pixels.shape[1] + GAP, pixels.shape[2] + GAP
    columns = min(COLUMNS, len(values))
    top = 2 * TITLE_HEIGHT + GAP
    picture = Image.new("RGB", (GAP + columns * width, top + height * -(-len(values) // columns)), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    draw.text((GAP, 2), title, INK)
    for column, name in enumerate(names[:columns]):
        draw.text((GAP + column * width + pixels.shape[2] // 2, TITLE_HEIGHT + 2), name, INK, anchor="ma")
    for number, image in enumerate(pixels):
        place = (GAP + number % columns * width, top + number // columns * height)
        picture.paste(Image.fromarray(image.numpy()), place)
    return picture


def _rgb(values: Tensor) -> Tensor:
    """[n, 1 or 3, height, width] in [0, 1] -> uint8 [n, height, width, 3], magenta where a channel is not finite."""
    values = values.float().expand(-1, 3, -1, -1).permute(0, 2, 3, 1)
    broken = ~values.isfinite().all(-1, keepdim=True)
    levels = torch.where(broken, torch.tensor(NOT_FINITE), (values.clamp(0, 1) * 255).round())
    return levels.to(torch.uint8).contiguous()


def image_sheet(images: Tensor, title: str, labels: Tensor) -> Image.Image:
    """Images in [-1, 1] with -1 black and 1 white; columns are named by the labels if each column has only one."""
    return sheet((images + 1) / 2, title, _column_names(labels))


def difference_sheet(images: Tensor, reference: Tensor, title: str, labels: Tensor) -> Image.Image:
    """|images - reference| with 0 black and 1 (half of the range) or more white."""
    return sheet((images - reference).abs(), title, _column_names(labels))


def _column_names(labels: Tensor) -> list[str]:
    shown = labels[:MAX_IMAGES].tolist()
    constant = all(label == shown[number % COLUMNS] for number, label in enumerate(shown))
    return [str(label) for label in shown[:COLUMNS]] if constant else []


def save_png(picture: Image.Image, path: Path) -> None:
    """Write a picture so that `path` never holds half of one. Raises DiskError."""
    data = io.BytesIO()
    picture.save(data, "PNG")
    write_bytes(path, data.getvalue())
