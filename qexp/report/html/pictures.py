"""Images of runs beside those of their references, for a page: WebP within a budget of bytes.

Read from outputs.safetensors of both, without torch. A sample is one image (of a video: the frame in its middle) of one
seed; runs that are compared with the same reference share its picture. The difference is computed from the stored
values, not from the pictures, whose compression would show in it; it is multiplied by a gain, a power of two for each
picture, so that its brightest thousandth is white.

Where the budget does not hold every picture, all are made smaller, and then each run has fewer samples.
"""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qexp.errors import DamagedFileError
from qexp.results.numbers import difference_gain
from qexp.results.rows import Row
from qexp.system.files import read_json

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Pixels = NDArray[np.floating[Any]]  # [height, width, 1 or 3] in [-1, 1]

OUTPUTS = "outputs.safetensors"
BUDGET_BYTES = 3_300_000  # of WebP; base64 makes 4.4 MB of them
MAX_SAMPLES = 8  # of a run
WANTED_PICTURES = 40  # for so many pairs the largest side is chosen; more of them, if they fit
SIDES = (512, 384, 256, 192, 128, 96)  # pixels of the longer side, at most
TRIED = 6  # pairs by which the side is chosen
SMALL = 64  # up to this side a picture is stored without loss
QUALITY = 82
NOT_FINITE = (255, 0, 255)


@dataclass(frozen=True)
class Outputs:
    """The images in one folder. frames: of a video, else 1; replaced: numbers of samples that a safety checker hid."""

    path: Path
    count: int
    frames: int
    labels: tuple[int, ...]
    replaced: frozenset[int]

    @property
    def samples(self) -> int:
        return self.count // self.frames

    def read(self, sample: int) -> Pixels:
        """Return one image, of a video the frame in its middle."""
        with _opened(self.path) as file:
            place = sample * self.frames + self.frames // 2
            image = file.get_slice("images")[place : place + 1][0]
        return image.transpose(1, 2, 0).astype("float32")


@dataclass(frozen=True)
class RunImages:
    """The images of a run. number: its place among the runs; row: of the table; key: of its reference, or ''."""

    number: int
    row: int
    seed: str
    outputs: Outputs
    expected: Outputs | None
    key: str
    prompts: Sequence[str] | None

    def name_of(self, sample: int) -> str:
        label = self.outputs.labels[sample * self.outputs.frames] if self.outputs.labels else sample
        text = self.prompts[label] if self.prompts and label < len(self.prompts) else f"label {label}"
        return f"{'image' if self.outputs.frames == 1 else 'video'} {sample}: {text}"


@dataclass
class Album:
    """The pictures that are in the page, and how many bytes they take."""

    side: int
    images: list[str] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    shots: list[dict[str, Any]] = field(default_factory=list)
    nbytes: int = 0

    def add(self, data: bytes) -> int:
        """Return the number of a picture."""
        self.nbytes += len(data)
        self.images.append(f"data:image/webp;base64,{base64.b64encode(data).decode()}")
        return len(self.images) - 1


def images_of(row: Row, number: int, table_row: int) -> RunImages | None:
    """Open the images of a run and of its reference; None for a run that left none.

    Raises: DamagedFileError for a file that is none of ours.
    """
    if (outputs := open_outputs(row["folder"])) is None:
        return None
    key = str((read_json(row["folder"] / "result.json") or {}).get("reference") or "")
    expected = open_outputs(row["folder"].parents[1] / "references" / key) if key else None
    if expected is not None and (expected.count, expected.frames) != (outputs.count, outputs.frames):
        expected = None
    prompts = (row["config"]["task"] or {}).get("prompt")
    seed = str(row["config"].get("seed", ""))
    return RunImages(number, table_row, seed, outputs, expected, key if expected else "", prompts)


def open_outputs(folder: Path) -> Outputs | None:
    """Read what images a folder has; None without any. Raises DamagedFileError."""
    path = folder / OUTPUTS
    if not path.is_file():
        return None
    with _opened(path) as file:
        names = set(file.keys())
        if "images" not in names:
            return None
        count = file.get_slice("images").get_shape()[0]
        videos = file.get_slice("latents").get_shape()[0] if "latents" in names else count
        frames = max(count // max(videos, 1), 1)
        labels = tuple(int(label) for label in file.get_tensor("labels")) if "labels" in names else ()
        flags = [file.get_tensor(name) for name in names if file.get_slice(name).get_dtype() == "BOOL"]
    replaced = {number for values in flags for number, value in enumerate(values.reshape(-1)) if value}
    return Outputs(path, count, frames, labels, frozenset(replaced))


def _opened(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, "np")
    except (SafetensorError, OSError) as error:
        raise DamagedFileError(path, str(error)) from error


def make_album(runs: Sequence[RunImages], budget: int = BUDGET_BYTES) -> dict[str, Any]:
    """Return the pictures of runs for the page.

    samples: {name, seed, reference (number of a picture or null), width, height} of the originals; shots: {sample, row,
    run, image, difference (number of a picture or null), gain, white (the difference that is white, as a share of the
    range), is_identical, is_replaced}; images: data URLs; note: what was left out, ''.
    """
    wanted = list(_in_turns(runs))
    album = Album(_fitting_side(wanted, budget))
    known: dict[tuple[str, int, str, str], int] = {}
    left = 0
    for run, sample in wanted:
        if album.nbytes >= budget:
            left += 1
        else:
            _add_shot(album, run, sample, known)
    album.shots = sorted(album.shots, key=lambda shot: (shot["sample"], shot["row"]))
    return {
        "samples": album.samples, "shots": album.shots, "images": album.images,
        "note": _note(len(album.shots), sum(run.outputs.samples for run in runs), album.side, runs),
    }  # fmt: skip


def _in_turns(runs: Sequence[RunImages]) -> Iterator[tuple[RunImages, int]]:
    """The first sample of every run, then the second of every run."""
    for sample in range(max((min(run.outputs.samples, MAX_SAMPLES) for run in runs), default=0)):
        yield from ((run, sample) for run in runs if sample < run.outputs.samples)


def _fitting_side(wanted: Sequence[tuple[RunImages, int]], budget: int) -> int:
    """Return the largest side with which as many pairs as are wanted fit, by the sizes of a few of them."""
    tried = random.Random(0).sample(wanted, min(TRIED, len(wanted)))
    if not tried:
        return SIDES[0]
    trial = Album(SIDES[0])
    for run, sample in tried:
        _add_shot(trial, run, sample, {})
    pairs = max(min(len(wanted), WANTED_PICTURES), len({run.number for run, _ in wanted}))
    needed = 1.1 * trial.nbytes * pairs / len(tried)
    largest = min(max(max(sample["width"], sample["height"]) for sample in trial.samples), SIDES[0])
    # half the side has more than a quarter of the bytes: detail is denser in it
    return next((side for side in SIDES if needed * min(side / largest, 1) ** 1.5 <= budget), SIDES[-1])


def _add_shot(album: Album, run: RunImages, sample: int, known: dict[tuple[str, int, str, str], int]) -> None:
    ours = run.outputs.read(sample)
    theirs = run.expected.read(sample) if run.expected else None
    identity = (run.key, sample, run.seed, run.name_of(sample))
    if identity not in known:
        known[identity] = len(album.samples)
        reference = None if theirs is None else album.add(encode(theirs, album.side))
        height, width = ours.shape[:2]
        album.samples.append(
            {"name": identity[3], "seed": run.seed, "reference": reference, "width": width, "height": height}
        )
    is_replaced = sample in run.outputs.replaced or (run.expected is not None and sample in run.expected.replaced)
    shot: dict[str, Any] = {"sample": known[identity], "row": run.row, "run": run.number, "is_replaced": is_replaced}
    shot |= {"difference": None, "gain": None, "white": None, "is_identical": False}
    reference = album.samples[known[identity]]["reference"]
    if theirs is not None and theirs.shape == ours.shape and (ours == theirs).all():
        album.shots.append(shot | {"image": reference, "is_identical": True})
        return
    shot["image"] = album.add(encode(ours, album.side))
    if theirs is not None and theirs.shape == ours.shape:
        difference, gain = amplified_difference(ours, theirs, album.side)
        shot |= {"difference": album.add(_webp(difference)), "gain": gain, "white": 1 / (2 * gain)}
    album.shots.append(shot)


def encode(pixels: Pixels, side: int) -> bytes:
    """Return an image, [height, width, 1 or 3] in [-1, 1], as WebP with a longer side of at most `side`."""
    import numpy as np

    return _webp(_to_picture(_shrunk(pixels / 2 + np.float32(0.5), side)))


def amplified_difference(ours: Pixels, theirs: Pixels, side: int) -> tuple[Any, float]:
    """Return |ours - theirs| times a gain as a picture, black where nothing differs, and the gain.

    The gain is the power of two, 1 or more, with which all but the highest thousandth of the difference as it is shown
    stays within the range. Values that are not finite do not count.
    """
    import numpy as np

    difference = _shrunk(np.abs(ours - theirs), side)
    gain = difference_gain(difference)
    return _to_picture(difference * gain), gain


def _shrunk(values: Pixels, side: int) -> Pixels:
    """Average an image down; small ones stay as they are."""
    import numpy as np
    from PIL import Image

    height, width, channels = values.shape
    if max(height, width) <= side:
        return values
    size = (max(round(width * side / max(height, width)), 1), max(round(height * side / max(height, width)), 1))
    planes = [
        Image.fromarray(np.ascontiguousarray(values[..., channel]), "F").resize(size, Image.Resampling.BOX)
        for channel in range(channels)
    ]
    return np.stack([np.asarray(plane) for plane in planes], axis=-1)


def _to_picture(values: Pixels) -> Any:
    """[height, width, 1 or 3] in [0, 1] as RGB, magenta where a value is not finite."""
    import numpy as np
    from PIL import Image

    colors = np.broadcast_to(values, (*values.shape[:2], 3))
    broken = ~np.isfinite(colors).all(-1, keepdims=True)
    levels = np.where(broken, np.array(NOT_FINITE), np.rint(np.nan_to_num(colors).clip(0, 1) * 255))
    return Image.fromarray(levels.astype(np.uint8), "RGB")


def _webp(picture: Any) -> bytes:
    data = io.BytesIO()
    is_small = max(picture.size) <= SMALL
    picture.save(data, "WEBP", quality=100 if is_small else QUALITY, lossless=is_small)
    return data.getvalue()


def _note(shown: int, total: int, side: int, runs: Sequence[RunImages]) -> str:
    """What the page does not show of what there is."""
    parts = []
    if shown < total:
        parts.append(f"{shown} of {total} images are in this page: the first ones of each run, as far as they fit")
    largest = max((run.outputs.read(0).shape[:2] for run in runs), default=(0, 0), key=max)
    if max(largest) > side:
        parts.append(f"images are shown with at most {side} pixels a side (they have {largest[1]} × {largest[0]})")
    if any(run.outputs.frames > 1 for run in runs):
        parts.append("of each video, the frame in its middle")
    if gone := sum(run.expected is None for run in runs):
        parts.append(f"{gone} runs have no reference here to be compared with")
    return "; ".join(parts)
