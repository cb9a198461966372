"""Sheets of images as PNG: a title, the names of the images, and the images in reading order.

Small images are enlarged without smoothing, large ones are averaged down. A pixel that is not finite is magenta, so
that an overflow is seen at once.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qexp.results.numbers import difference_gain
from qexp.system.files import write_bytes

if TYPE_CHECKING:
    from PIL import Image

COLUMNS = 10
MAX_IMAGES = 100
MIN_SIDE = 32  # smaller images are enlarged by a whole factor to at least this many pixels
MAX_SIDE = 512  # larger ones are shrunk to this many on a sheet
MAX_WIDTH = 2600  # of a sheet of images that are not small
GAP = 4
TITLE_HEIGHT = 16
LETTER_WIDTH = 6  # pixels of a letter of a name, about
BACKGROUND, INK, NOT_FINITE = (255, 255, 255), (40, 40, 40), (255, 0, 255)
FRAME_MS = 1000 // 16  # of a video


def sheet(values: Tensor, title: str, names: Sequence[object]) -> Image.Image:
    """Return the first 100 images on one sheet: values [n, 1 or 3, height, width] in [0, 1]; a name for each of them.

    Names stand above the columns if every column has only one, else above the images; one that is repeated stands once.
    """
    from PIL import Image, ImageDraw

    pixels = _to_rgb_bytes(_resized(values[:MAX_IMAGES]))  # [n, height, width, 3]
    columns = min(COLUMNS, len(pixels), max(1, MAX_WIDTH // (pixels.shape[2] + GAP)))
    shown = [str(name) for name in names[: len(pixels)]]
    of_columns = all(name == shown[number % columns] for number, name in enumerate(shown))
    above = 0 if of_columns else TITLE_HEIGHT
    height, width = pixels.shape[1] + GAP + above, pixels.shape[2] + GAP
    top = GAP + (2 if of_columns else 1) * TITLE_HEIGHT
    picture = Image.new("RGB", (GAP + columns * width, top + height * -(-len(pixels) // columns)), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    draw.text((GAP, 2), title, INK)
    for number, image in enumerate(pixels):
        left, line = GAP + number % columns * width, top + number // columns * height
        picture.paste(Image.fromarray(image.numpy()), (left, line + above))
        if (number == 0 or shown[number] != shown[number - 1]) and (number < columns or not of_columns):
            name = _shorten_label(shown[number], pixels.shape[2])
            draw.text((left + pixels.shape[2] // 2, line + above - TITLE_HEIGHT - 2), name, INK, anchor="ma")
    return picture


def _shorten_label(name: str, width: int) -> str:
    letters = max(width // LETTER_WIDTH, 1)
    plain = name.encode("latin-1", "replace").decode("latin-1")  # what the font has
    return plain if len(plain) <= letters else f"{plain[: letters - 2]}.." if letters > 4 else plain[:letters]


def _resized(values: Tensor) -> Tensor:
    values = values.float()
    if max(values.shape[-2:]) > MAX_SIDE:
        ratio = MAX_SIDE / max(values.shape[-2:])
        size = [max(round(side * ratio), 1) for side in values.shape[-2:]]
        return torch.nn.functional.interpolate(values, size, mode="area")  # what is not finite stays so
    scale = -(-MIN_SIDE // min(values.shape[-2:]))
    return values.repeat_interleave(scale, 2).repeat_interleave(scale, 3)


def _to_rgb_bytes(values: Tensor) -> Tensor:
    """[n, 1 or 3, height, width] in [0, 1] -> uint8 [n, height, width, 3], magenta where a channel is not finite."""
    values = values.float().expand(-1, 3, -1, -1).permute(0, 2, 3, 1)
    broken = ~values.isfinite().all(-1, keepdim=True)
    levels = torch.where(broken, torch.tensor(NOT_FINITE), (values.clamp(0, 1) * 255).round())
    return levels.to(torch.uint8).contiguous()


def image_sheet(images: Tensor, title: str, names: Sequence[object]) -> Image.Image:
    """Draw images in [-1, 1], -1 black and 1 white, with their names."""
    return sheet((images + 1) / 2, title, names)


def difference_sheet(images: Tensor, reference: Tensor, names: Sequence[object]) -> Image.Image:
    """Draw |images - reference|, both in [-1, 1], 0 black; the title has the gain and the difference drawn white."""
    difference = (images.float() - reference.float()).abs()
    gain = difference_gain(difference.numpy())
    title = f"|difference| x {gain:g}, white is {1 / gain:.3g} of 2"
    return sheet(difference * gain, title if difference.ne(0).any() else "identical to the reference", names)


def write_images(images: Tensor, frames: int, folder: Path) -> None:
    """Each image in full size, `0000.png` and so on; of videos, `frames` images each, animations `0000.webp`.

    images [n, 1 or 3, height, width] in [-1, 1]; 100 of them. Raises DiskError.
    """
    from PIL import Image

    for number, video in enumerate(images.split(frames)[:MAX_IMAGES]):
        first, *others = [Image.fromarray(pixels.numpy()) for pixels in _to_rgb_bytes((video + 1) / 2)]
        if not others:
            save_png(first, folder / f"{number:04}.png")
            continue
        _save_image(first, folder / f"{number:04}.webp", "WEBP", save_all=True, append_images=others, duration=FRAME_MS)


def save_png(picture: Image.Image, path: Path) -> None:
    """Write a picture so that `path` never holds half of one. Raises DiskError."""
    _save_image(picture, path, "PNG")


def _save_image(picture: Image.Image, path: Path, kind: str, **settings: Any) -> None:
    data = io.BytesIO()
    picture.save(data, kind, **settings)
    write_bytes(path, data.getvalue())
