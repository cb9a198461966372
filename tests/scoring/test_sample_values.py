"""samples.csv: the values of images, videos, prompts and windows, whose means are the metrics in result.json."""

import csv
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from qexp.config.generate import GenerateConfig
from qexp.config.schema import QUALITY_METRICS, MetricsConfig
from qexp.errors import DamagedFileError
from qexp.metrics.registry import all_metrics
from qexp.models import arithmetic, digits
from qexp.results.samples import Values, read_samples
from qexp.scoring.score import score

TEXT = ["12", "3+4=", "12"]  # two prompts of one text are two samples


def config(source: Any, task: Any, names: tuple[str, ...] = QUALITY_METRICS) -> Any:
    return SimpleNamespace(model=source.Config(), task=task, metrics=MetricsConfig(names=names), seed=7)


def image_outputs(error: float = 0.0, count: int = 12, frames: int = 1) -> dict[str, Tensor]:
    """Images that are off by `error` * their number: the first one is identical to the reference's."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 1, 8, 8, generator=generator) - 0.5
    images += error * torch.arange(count).view(-1, 1, 1, 1) / count
    latents = {"latents": torch.zeros(count // frames, 4)} if frames > 1 else {}
    labels = (torch.arange(count) % 3) * (frames == 1)
    return {"images": images, "labels": labels, "trajectory": torch.ones(2, 1), **latents}


def write_run(folder: Path, outputs: dict[str, Tensor]) -> Path:
    folder.mkdir()
    save_file(outputs, folder / "outputs.safetensors")
    (folder / "memory.csv").write_text("step,step_ms\n1,1.0\n2,1.0\n")
    return folder


def text_outputs(seed: int, windows: tuple[int, ...] = (4, 2)) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    count = sum(windows)
    return {
        "prompts": torch.ones(3, 2, dtype=torch.int32), "tokens": torch.randint(3, 5, (3, 1), generator=generator),
        "lengths": torch.ones(3, dtype=torch.int64), "nonfinite": torch.zeros(3),
        "nll": torch.rand(count, generator=generator), "top1": torch.randint(0, 2, (count,), generator=generator),
        "targets": torch.arange(count, dtype=torch.int32),
        "windows": torch.arange(len(windows), dtype=torch.int32).repeat_interleave(torch.tensor(windows)),
    }  # fmt: skip


def write_text_run(folder: Path, outputs: dict[str, Tensor], seed: int) -> Path:
    folder.mkdir()
    save_file(outputs, folder / "outputs.safetensors")
    logits = torch.randn(len(outputs["nll"]), 9, generator=torch.Generator().manual_seed(seed))
    save_file({"logprobs": logits.log_softmax(-1)}, folder / "logprobs.safetensors")
    with (folder / "texts.csv").open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([["prompt", "text"], *([prompt, "x"] for prompt in TEXT)])
    return folder


def mean_of(name: str, values: Values) -> float:
    finite = [(value, weight) for value, weight in values.values() if math.isfinite(value)]
    mean = sum(value * weight for value, weight in finite) / sum(weight for _, weight in finite)
    return math.exp(mean) if all_metrics()[name].of_mean == "exp" else mean


def score_images(tmp_path: Path, frames: int = 1, **settings: Any) -> tuple[Path, dict[str, float | None]]:
    reference = write_run(tmp_path / "reference", image_outputs(frames=frames))
    run = write_run(tmp_path / "run", image_outputs(error=0.4, frames=frames))
    return run, score(config(digits, GenerateConfig(**settings)), run, reference)


def score_text(tmp_path: Path) -> tuple[Path, dict[str, float | None]]:
    reference = write_text_run(tmp_path / "text_reference", text_outputs(0), 0)
    run = write_text_run(tmp_path / "text", text_outputs(1), 1)
    return run, score(config(arithmetic, GenerateConfig(prompt=tuple(TEXT))), run, reference)


def test_every_mean_over_samples_is_the_mean_of_its_samples(tmp_path: Path) -> None:
    found: set[str] = set()
    for run, numbers in (score_images(tmp_path), score_text(tmp_path)):
        values = read_samples(run)
        for name, samples in values.items():
            assert mean_of(name, samples) == pytest.approx(numbers[name], rel=1e-12)
        found |= set(values)
    declared = {
        name
        for name, metric in all_metrics().items()
        if metric.sample_kind and metric.compute and metric.setting is None
    }
    assert found == declared - {"quality/answer_accuracy"}  # no prompt here is a problem: undefined
    assert len(found) == 7


def test_images_are_named_by_number_and_label(tmp_path: Path) -> None:
    run, numbers = score_images(tmp_path)
    values = read_samples(run)["quality/psnr_db"]
    assert [*values][:4] == [("7", "image 0: 0"), ("7", "image 1: 1"), ("7", "image 2: 2"), ("7", "image 3: 0")]
    assert values["7", "image 0: 0"] == (math.inf, 1)  # identical
    assert values["7", "image 6: 0"][0] == pytest.approx(20, abs=1e-4)  # 10 log10(2² / 0.2²)
    assert numbers["quality/differing_images"] == 11 and len(values) == 12


def test_frames_of_a_video_are_one_sample(tmp_path: Path) -> None:
    run, numbers = score_images(tmp_path, frames=4)
    values = read_samples(run)["quality/psnr_db"]
    assert [sample for _, sample in values] == ["video 0: 0", "video 1: 0", "video 2: 0"]
    assert [weight for _, weight in values.values()] == [3, 4, 4]  # the first frame of all is identical
    assert mean_of("quality/psnr_db", values) == pytest.approx(numbers["quality/psnr_db"], rel=1e-12)


def test_prompts_and_windows_are_named_by_what_they_hold(tmp_path: Path) -> None:
    run, _ = score_text(tmp_path)
    values = read_samples(run)
    assert [sample for _, sample in values["quality/exact_match"]] == ["prompt 0: 12", "prompt 1: 3+4=", "prompt 2: 12"]
    (first, second), weights = values["quality/perplexity"], [w for _, w in values["quality/perplexity"].values()]
    assert first[1].startswith("tokens 0-3 (") and second[1].startswith("tokens 4-5 (") and weights == [4, 2]
    nll = text_outputs(1)["nll"].double()
    assert [value for value, _ in values["quality/perplexity"].values()] == pytest.approx(
        [nll[:4].mean().item(), nll[4:].mean().item()]
    )


def test_another_text_has_other_samples(tmp_path: Path) -> None:
    run, _ = score_text(tmp_path)
    other = text_outputs(1) | {"targets": torch.arange(6, dtype=torch.int32) + torch.tensor([0, 0, 0, 0, 0, 1])}
    score(config(arithmetic, GenerateConfig()), write_text_run(tmp_path / "other", other.copy(), 1), None)
    here, there = (set(read_samples(folder)["quality/perplexity"]) for folder in (run, tmp_path / "other"))
    assert len(here & there) == 1  # the first window is the same


def test_outputs_without_windows_have_no_samples_of_tokens(tmp_path: Path) -> None:
    outputs = {name: tensor for name, tensor in text_outputs(1).items() if name != "windows"}
    run = write_text_run(tmp_path / "old", outputs, 1)
    assert score(config(arithmetic, GenerateConfig()), run, None)["quality/perplexity"] is not None
    assert read_samples(run) == {}


def test_long_prompts_are_shortened_but_stay_apart(tmp_path: Path) -> None:
    prompts = ("a" * 200 + "x", "a" * 200 + "y", "a cat\nholding a sign")
    run, _ = score_images(tmp_path, prompt=prompts)
    names = [sample for _, sample in read_samples(run)["quality/ssim"]]
    assert len({name.partition(": ")[2] for name in names}) == 3
    assert max(map(len, names)) < 120 and "image 2: a cat\nholding a sign" in names


def test_undefined_metrics_have_no_samples(tmp_path: Path) -> None:
    broken = image_outputs(error=0.1)
    broken["images"][3, 0, 0, 0] = math.nan
    run = write_run(tmp_path / "run", broken)
    score(config(digits, GenerateConfig()), run, write_run(tmp_path / "reference", image_outputs()))
    assert set(read_samples(run)) == {"quality/class_accuracy"}


def test_identical_runs_have_infinite_samples(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", image_outputs())
    assert score(config(digits, GenerateConfig()), run, run)["quality/psnr_db"] is None
    assert {value for value, _ in read_samples(run)["quality/psnr_db"].values()} == {math.inf}


def test_scoring_without_such_metrics_leaves_no_file_of_before(tmp_path: Path) -> None:
    run, _ = score_images(tmp_path)
    assert (run / "samples.csv").is_file()
    score(config(digits, GenerateConfig(), ("frechet_distance",)), run, None)
    assert not (run / "samples.csv").exists() and read_samples(run) == {}


def test_texts_of_an_earlier_version_are_no_samples(tmp_path: Path) -> None:
    (tmp_path / "samples.csv").write_text("prompt,text,reference,same\nx,a,b,0\n")
    assert read_samples(tmp_path) == {}


@pytest.mark.parametrize("line", ["0,image 1", "0,image 1,quality/ssim,high,1", "0,image 1,quality/ssim,0.5,"])
def test_damaged_samples_are_an_error(line: str, tmp_path: Path) -> None:
    (tmp_path / "samples.csv").write_text(f"seed,sample,metric,value,weight\n{line}\n")
    with pytest.raises(DamagedFileError, match=r"samples\.csv: is damaged"):
        read_samples(tmp_path)
