"""The second, pure step of a task: quality numbers and pictures from saved outputs, without running a model.

Reads outputs.safetensors (and memory.csv) of the run and of its reference; writes images/*.png (sheets, and where there
are prompts each image; of text: compared_texts.csv, of a network's outputs: outputs.csv), history.csv and samples.csv
(`qexp/results/samples.py`) into the run's folder. The numbers depend on nothing but those files and `config`. Which
metrics there are, and their formulas, is in `qexp/metrics/`. Values that are not finite are counted in a warning, and
magenta in the pictures.

Importing this module imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from qexp.errors import LoadError
from qexp.metrics.registry import Metric, Result, Samples, all_metrics
from qexp.models.base import load_source
from qexp.results.samples import mean_by_sample, shorten_text, write_samples
from qexp.scoring.answers import answer_numbers, answer_samples
from qexp.system.screen import say

if TYPE_CHECKING:
    from torch import Tensor

    from qexp.config.schema import RunConfig

    Tensors = dict[str, Tensor]
Numbers = dict[str, float | None]


def score(config: RunConfig, folder: Path, reference: Path | None) -> Numbers:
    """Return quality/* of the run in `folder`, against the reference's folder if there is one.

    Only the metrics in config.metrics.names that outputs of this kind have; {} for a task that leaves none. A metric
    that the model source does not define, or that has no finite value, is None.
    Raises: LoadError if saved outputs are missing or do not fit each other, DiskError if nothing can be written.
    """
    if not config.task.saves_outputs:
        return {}
    outputs = _read_outputs(folder)
    expected = _read_outputs(reference) if reference is not None else None
    kinds = {"forward": "outputs", "lm_eval": "answers"}
    kind = kinds.get(config.task.name) or ("images" if "images" in outputs else "text")
    broken = _count_nonfinite(kind, outputs)
    _warn_of_nonfinite(kind, broken, 0 if expected is None else _count_nonfinite(kind, expected))
    prepare = {
        "images": _prepare_images,
        "text": _prepare_text,
        "outputs": _prepare_outputs,
        "answers": _prepare_answers,
    }[kind]
    samples, numbers = prepare(config, folder, outputs, reference, expected)
    numbers |= {"quality/finite": float(not broken), **({"quality/nonfinite": broken} if broken else {})}
    values: dict[str, dict[str, tuple[float, float]]] = {}
    for metric in all_metrics().values():
        if metric.compute is not None and _is_wanted(metric, config, samples):
            found = metric.compute(samples)
            result = found if isinstance(found, Result) else Result(found)
            numbers |= {**result.also, metric.name: result.value}
            values[metric.name] = _values_by_sample(metric, result, samples)
    if kind == "answers":
        values |= answer_samples(folder, outputs)
    write_samples(folder, config.seed, {name: found for name, found in values.items() if found})
    return {name: value if value is not None and math.isfinite(value) else None for name, value in numbers.items()}


def _values_by_sample(metric: Metric, result: Result, samples: Samples) -> dict[str, tuple[float, float]]:
    """Sample -> (value, weight); {} for a metric that is no mean over samples, or whose value is undefined.

    Outputs of version 0.2 do not say which window a token is of; and where a safety checker replaced images, the source
    may have scored others than those that are shown.
    """
    names = samples.names.get(metric.sample_kind, ())
    is_exact = result.value is None and set(result.samples or ()) == {math.inf}
    is_defined = is_exact or (result.value is not None and math.isfinite(result.value))
    if result.samples is None or len(names) != len(result.samples) or not is_defined:
        return {}
    return mean_by_sample(names, result.samples)


def _is_wanted(metric: Metric, config: RunConfig, samples: Samples) -> bool:
    return (
        config.task.name in metric.tasks
        and (not metric.is_chosen or metric.short_name in config.metrics.names)
        and (not metric.compares or samples.expected is not None)
        and all(samples.holds(name) for name in metric.needs)
    )


def _count_nonfinite(kind: str, outputs: Tensors) -> int:
    """Return how many of the values that are compared are not finite: of text, how many tokens' probabilities."""
    from qexp.metrics.tensors import count_nonfinite

    if kind == "text":
        from qexp.scoring.text import count_nonfinite_tokens

        return count_nonfinite_tokens(outputs)
    if kind == "answers":
        return count_nonfinite(outputs["loglikelihoods"])
    compared = [name for name in outputs if kind == "outputs" or name in ("images", "latents")]
    return sum(count_nonfinite(outputs[name]) for name in compared)


def _warn_of_nonfinite(kind: str, ours: int, theirs: int) -> None:
    what = {"text": "probabilities of tokens", "answers": "probabilities of answers"}.get(kind, "values")
    if ours:
        say(
            f"warning: {ours} {what} are not finite, so nothing is compared with the reference; use another "
            "compute_dtype or backend, or repair the checkpoint",
        )
    if theirs:
        say(f"warning: the reference has {theirs} {what} that are not finite; nothing to compare with")


def _prepare_images(
    config: RunConfig, folder: Path, outputs: Tensors, reference: Path | None, expected: Tensors | None
) -> tuple[Samples, Numbers]:
    from qexp.scoring.detected import shown_images
    from qexp.scoring.perceptual import perceptual_tools

    if expected is not None:
        _check_fit(("images", "latents", "trajectory"), outputs, expected, folder, reference)
    _write_pictures(config, outputs, expected, folder)
    _write_history(outputs, expected, folder)
    shown, detected = shown_images(outputs, expected)
    images = outputs["images"][shown]
    theirs = None if expected is None else expected["images"][shown]
    prompts = config.task.prompt and [config.task.prompt[label] for label in outputs["labels"][shown].tolist()]
    samples = Samples(
        outputs={**outputs, "images": images},
        expected=None if expected is None or theirs is None else {**expected, "images": theirs},
        pairs=[] if theirs is None else [(theirs, images)],
        is_complete=bool(shown.all()),
        prompts=prompts,
        own_scores=cache(lambda: load_source(config.model).scores(outputs)),
        own_samples=lambda: load_source(config.model).sample_scores(outputs),
        names={"images": _image_names(config, outputs, shown.tolist())},
        tools=perceptual_tools(config.metrics, images, theirs),
    )
    counts: Numbers = {f"quality/{name}": value for name, value in detected.items()}
    return samples, {**counts, "quality/images": float(len(images))}


def _frames_of(outputs: Tensors) -> int:
    """Return how many images belong to one sample: the frames of a video."""
    return len(outputs["images"]) // len(outputs["latents"]) if "latents" in outputs else 1


def _image_names(config: RunConfig, outputs: Tensors, shown: list[bool]) -> list[str]:
    """'image 3: 7' (its label) or 'video 0: A red cube' (its prompt) for each image that is shown."""
    frames, prompts = _frames_of(outputs), config.task.prompt
    kind = "image" if frames == 1 else "video"
    labels = [shorten_text(prompts[label]) if prompts else label for label in outputs["labels"].tolist()]
    names = [f"{kind} {number // frames}: {label}" for number, label in enumerate(labels)]
    return [name for name, is_shown in zip(names, shown, strict=True) if is_shown]


def _prepare_text(
    config: RunConfig, folder: Path, outputs: Tensors, reference: Path | None, expected: Tensors | None
) -> tuple[Samples, Numbers]:
    from qexp.scoring.text import paired_rows, text_names, write_compared_texts

    if expected is not None:
        _check_fit(("prompts", "targets"), outputs, expected, folder, reference)
    if "tokens" in outputs:
        write_compared_texts(folder, reference)
    broken = _count_nonfinite("text", outputs)
    samples = Samples(
        outputs=outputs,
        expected=expected,
        is_comparable=not broken + _count_nonfinite("text", expected or {}),
        own_scores=dict if broken else cache(lambda: load_source(config.model).scores(outputs)),
        own_samples=dict if broken else lambda: load_source(config.model).sample_scores(outputs),
        names=text_names(folder, outputs),
        tools={} if reference is None else {"logprobs": lambda: paired_rows(folder, reference)},
    )
    counted = {"quality/prompts": "tokens", "quality/tokens": "nll"}  # metric -> the output with a row for each
    return samples, {metric: float(len(outputs[name])) for metric, name in counted.items() if name in outputs}


def _prepare_answers(
    config: RunConfig, folder: Path, outputs: Tensors, reference: Path | None, expected: Tensors | None
) -> tuple[Samples, Numbers]:
    if expected is None:
        return Samples(outputs), answer_numbers(folder)
    _check_fit({**outputs, **expected}, outputs, expected, folder, reference)
    pairs = [(expected[name], output) for name, output in outputs.items() if len(output)]
    return Samples(outputs, expected, pairs=pairs), answer_numbers(folder)


def _prepare_outputs(
    config: RunConfig, folder: Path, outputs: Tensors, reference: Path | None, expected: Tensors | None
) -> tuple[Samples, Numbers]:
    from qexp.scoring.outputs import write_comparison

    if expected is None:
        return Samples(outputs), {}
    _check_fit({**outputs, **expected}, outputs, expected, folder, reference)
    write_comparison(outputs, expected, folder)
    return Samples(outputs, expected, pairs=[(expected[name], output) for name, output in outputs.items()]), {}


def _read_outputs(folder: Path) -> Tensors:
    """Read outputs.safetensors as tensors of their own: aligned alike in every process, which keeps the last bits."""
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
    frames = _frames_of(outputs)
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
    save_png(difference_sheet(images, theirs, names), folder / "images" / "difference.png")


def _shown(count: int, frames: int) -> list[int]:
    """Return the images on a sheet: of each video ten of its frames, evenly spaced."""
    from qexp.scoring.pictures import COLUMNS

    few = min(frames, COLUMNS)
    chosen = [number * (frames - 1) // max(few - 1, 1) for number in range(few)]
    return [start + frame for start in range(0, count, frames) for frame in chosen]


def _write_history(outputs: Tensors, expected: Tensors | None, folder: Path) -> None:
    """history.csv: memory.csv, and with a reference a column relative_l2 of the state after each step.

    The column is empty where the value is undefined (a state that is not finite).
    """
    from qexp.metrics.tensors import compare
    from qexp.system.files import read_csv, to_csv, write_text

    path = folder / "memory.csv"
    if (rows := read_csv(path)) is None:
        raise LoadError(f"{path} is missing, so there is no history; run it again with resume=none")
    if len(rows) != len(outputs["trajectory"]):
        raise LoadError(
            f"{path} has {len(rows)} rows, but the saved trajectory {len(outputs['trajectory'])} steps; "
            "run it again with resume=none"
        )
    if expected is not None:
        for row, ours, theirs in zip(rows, outputs["trajectory"], expected["trajectory"], strict=True):
            error = compare(theirs, ours).relative_l2
            row["relative_l2"] = "" if error is None else repr(error)
    write_text(folder / "history.csv", to_csv(list(rows[0]), rows))
