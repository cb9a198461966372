"""The second, pure step of a task: quality numbers and pictures from saved outputs, without running a model.

Reads outputs.safetensors (and memory.csv) of the run and of its reference; writes images/*.png (sheets, and where there
are prompts each image; of text: samples.csv, of a network's outputs: outputs.csv) and history.csv into the run's
folder; the numbers depend on nothing but those files and `config`. Beside the metrics that were asked for:

    quality/finite   1 if every value of the images (of text: every probability) is finite. If not, a warning says how
                     many are not, comparisons with the reference are None (null in JSON), and the pixels are magenta
                     in the pictures
    quality/nonfinite    how many values (of text: tokens) are not finite, if any
    quality/exact    with a reference: 1 if all outputs are identical to it (then psnr_db, which is infinite, is None)
    quality/nsfw_content_detected   images that a pipeline's safety checker put black ones in place of, by the name that
                     the pipeline has for it; see `detected.py`

Importing this module imports no torch, so that `check_names` can run while the configuration is composed.
"""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from qexp.config.schema import PERCEPTUAL_METRICS, QUALITY_METRICS
from qexp.errors import ConfigError, LoadError, choices
from qexp.models.base import load_source

if TYPE_CHECKING:
    from torch import Tensor

    from qexp.config.schema import RunConfig

    Tensors = dict[str, Tensor]
Numbers = dict[str, float | None]

REFERENCE_METRICS = ("psnr_db", "ssim", "relative_l2", "cosine")  # image against image
LATENT_METRICS = ("latent_relative_l2",)  # of pipelines, which have latents
SOURCE_METRICS = {"images": ("class_accuracy", "frechet_distance"), "text": ("answer_accuracy",)}  # the source's own


def check_names(names: Iterable[str]) -> None:
    """Raises ConfigError for a metric that does not exist."""
    for name in names:
        if name not in (known := (*QUALITY_METRICS, *PERCEPTUAL_METRICS)):
            raise ConfigError(f"metrics.names: {name!r} is unknown; use {choices(known)}")


def score(config: RunConfig, folder: Path, reference: Path | None) -> dict[str, float | None]:
    """quality/* of the run in `folder`, against the reference's folder if there is one.

    Only the metrics in config.metrics.names that outputs of this kind have; {} for a task that leaves none. A metric
    that the model source does not define, or that has no finite value, is None.
    Raises: LoadError if saved outputs are missing or do not fit each other, DiskError if nothing can be written.
    """
    check_names(config.metrics.names)
    if not getattr(config.task, "saves_outputs", True):
        return {}
    outputs = _read_outputs(folder)
    expected = _read_outputs(reference) if reference is not None else None
    kind = "outputs" if config.task.name == "forward" else "images" if "images" in outputs else "text"
    score_kind = {"images": _score_images, "text": _score_text, "outputs": _score_outputs}[kind]
    broken = _count_nonfinite(kind, outputs, expected)
    numbers: Numbers = {"finite": float(not broken), **({"nonfinite": broken} if broken else {})}
    numbers |= score_kind(config, folder, outputs, reference, expected)
    if names := [name for name in SOURCE_METRICS.get(kind, ()) if name in config.metrics.names]:
        is_text_broken = kind == "text" and broken  # of images, each one that is broken counts as wrong
        scores = {} if is_text_broken else load_source(config.model).scores(outputs)
        numbers |= {name: scores.get(name) for name in names}
    return {
        f"quality/{name}": value if value is not None and math.isfinite(value) else None
        for name, value in numbers.items()
    }


def _count_nonfinite(kind: str, outputs: Tensors, expected: Tensors | None) -> int:
    """How many of a run's outputs are not finite. Warns of them, and of the reference's."""
    from qexp.metrics.tensors import count_nonfinite

    def count(made: Tensors) -> int:
        if kind == "text":
            from qexp.scoring.text import count_nonfinite_tokens

            return count_nonfinite_tokens(made)
        return sum(count_nonfinite(made[name]) for name in made if kind == "outputs" or name in ("images", "latents"))

    what = "probabilities of tokens" if kind == "text" else "values"
    if broken := count(outputs):
        print(
            f"warning: {broken} {what} are not finite, so nothing is compared with the reference; use another "
            "compute_dtype or backend, or repair the checkpoint",
            file=sys.stderr,
        )
    if expected is not None and (theirs := count(expected)):
        print(
            f"warning: the reference has {theirs} {what} that are not finite; nothing to compare with", file=sys.stderr
        )
    return broken


def _score_images(
    config: RunConfig, folder: Path, outputs: Tensors, reference: Path | None, expected: Tensors | None
) -> Numbers:
    from qexp.metrics.tensors import relative_l2
    from qexp.scoring.detected import compare_shown, shown_images

    if expected is not None:
        _check_fit(("images", "latents", "trajectory"), outputs, expected, folder, reference)
    _write_pictures(config, outputs, expected, folder)
    _write_history(outputs, expected, folder)
    shown, detected = shown_images(outputs, expected)
    numbers: Numbers = dict(detected)
    if expected is not None:
        compared = compare_shown(outputs["images"], expected["images"], shown)
        names = [name for name in REFERENCE_METRICS if name in config.metrics.names]
        numbers |= {name: compared[name] for name in (*names, "exact")}
        if "latents" in outputs and "latent_relative_l2" in config.metrics.names:
            numbers["latent_relative_l2"] = relative_l2(expected["latents"], outputs["latents"])
    if any(name in config.metrics.names for name in PERCEPTUAL_METRICS):
        from qexp.scoring.perceptual import perceptual_numbers

        others = expected["images"][shown] if expected is not None else None
        texts = config.task.prompt and [config.task.prompt[label] for label in outputs["labels"][shown].tolist()]
        numbers |= perceptual_numbers(config.metrics, texts, outputs["images"][shown], others)
    return numbers


def _score_text(
    config: RunConfig, folder: Path, outputs: Tensors, reference: Path | None, expected: Tensors | None
) -> Numbers:
    from qexp.scoring.text import text_numbers, write_samples

    if expected is not None:
        _check_fit(("prompts", "targets"), outputs, expected, folder, reference)
    if "tokens" in outputs:
        write_samples(folder, reference)
    return text_numbers(config.metrics.names, outputs, expected, folder, reference)


def _score_outputs(
    config: RunConfig, folder: Path, outputs: Tensors, reference: Path | None, expected: Tensors | None
) -> Numbers:
    from qexp.scoring.outputs import output_numbers

    if expected is not None:
        _check_fit({**outputs, **expected}, outputs, expected, folder, reference)
    return output_numbers(config.metrics.names, outputs, expected, folder)


def _read_outputs(folder: Path) -> Tensors:
    """outputs.safetensors as tensors of their own: aligned alike in every process, which keeps the last bits."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / "outputs.safetensors"
    try:
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    except FileNotFoundError:
        raise LoadError(f"{path} is missing, so there is nothing to score; run it again with resume=none") from None
    except SafetensorError as error:
        raise LoadError(f"{path} is damaged ({error}); run it again with resume=none") from error


def _check_fit(names: Iterable[str], outputs: Tensors, expected: Tensors, folder: Path, reference: Path | None) -> None:
    for name in (name for name in names if name in outputs or name in expected):
        ours, theirs = (tuple(side[name].shape) if name in side else None for side in (outputs, expected))
        if ours != theirs:
            raise LoadError(
                f"{name} of shape {ours} in {folder} cannot be compared with {theirs} in the reference {reference}; "
                "both must be of the same task: delete the one that is stale and run again"
            )


def _write_pictures(config: RunConfig, outputs: Tensors, expected: Tensors | None, folder: Path) -> None:
    from qexp.scoring.pictures import difference_sheet, image_sheet, save_png, write_images

    prompts = config.task.prompt
    frames = len(outputs["images"]) // len(outputs["latents"]) if "latents" in outputs else 1
    if prompts:
        write_images(outputs["images"], frames, folder / "images")
    shown = _shown(len(outputs["images"]), frames)
    images, labels = outputs["images"][shown], outputs["labels"][shown].tolist()
    names = [prompts[label] for label in labels] if prompts else labels
    save_png(image_sheet(images, f"{config.model.source}: generated", names), folder / "images" / "grid.png")
    if expected is None:
        return
    theirs = expected["images"][shown]
    save_png(image_sheet(theirs, "reference", names), folder / "images" / "reference.png")
    difference = difference_sheet(images, theirs, "|generated - reference|, white = 1 or more", names)
    save_png(difference, folder / "images" / "difference.png")


def _shown(count: int, frames: int) -> list[int]:
    """The images on a sheet: of each video ten of its frames, evenly spaced."""
    from qexp.scoring.pictures import COLUMNS

    few = min(frames, COLUMNS)
    chosen = [number * (frames - 1) // max(few - 1, 1) for number in range(few)]
    return [start + frame for start in range(0, count, frames) for frame in chosen]


def _write_history(outputs: Tensors, expected: Tensors | None, folder: Path) -> None:
    """history.csv: memory.csv, and with a reference a column relative_l2 of the state after each step.

    The column is empty where the value is undefined (a state that is not finite).
    """
    from qexp.metrics.tensors import relative_l2
    from qexp.system.files import to_csv, write_text

    path = folder / "memory.csv"
    try:
        rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    except FileNotFoundError:
        raise LoadError(f"{path} is missing, so there is no history; run it again with resume=none") from None
    if len(rows) != len(outputs["trajectory"]):
        raise LoadError(
            f"{path} has {len(rows)} rows, but the saved trajectory {len(outputs['trajectory'])} steps; "
            "run it again with resume=none"
        )
    if expected is not None:
        for row, ours, theirs in zip(rows, outputs["trajectory"], expected["trajectory"], strict=True):
            error = relative_l2(theirs, ours)
            row["relative_l2"] = "" if error is None else repr(error)
    write_text(folder / "history.csv", to_csv(list(rows[0]), rows))
