import csv
import json
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
from qexp.errors import ConfigError, LoadError
from qexp.models.digits import Config
from qexp.scoring.score import _count_nonfinite, _warn_of_nonfinite, score
from qexp.tasks.roundtrip import RoundtripConfig

STEPS = 3
REFERENCE_METRICS = ("psnr_db", "ssim", "relative_l2", "cosine")  # image against image
ALWAYS = {"quality/exact", "quality/finite", "quality/images"}


def config(*names: str, task: Any = None) -> Any:
    metrics = MetricsConfig(names=names or QUALITY_METRICS)
    return SimpleNamespace(model=Config(), task=task or GenerateConfig(), metrics=metrics, seed=0)


def outputs(error: float = 0.0, count: int = 20) -> dict[str, Tensor]:
    """Random images; with an error of `error` in every pixel, and of error * step in the trajectory."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 1, 8, 8, generator=generator) - 0.5
    trajectory = torch.ones(STEPS, count, 1, 8, 8) + error * torch.arange(1.0, STEPS + 1).view(-1, 1, 1, 1, 1)
    return {"images": images + error, "labels": torch.arange(count) % 10, "trajectory": trajectory}


def write_run(folder: Path, values: dict[str, Tensor], rows: int = STEPS) -> Path:
    folder.mkdir()
    save_file(values, folder / "outputs.safetensors")
    lines = [f"{step},{step / 2},0.25,0.0" for step in range(1, rows + 1)]
    (folder / "memory.csv").write_text("\n".join(["step,step_ms,host_gib,device_gib", *lines]) + "\n")
    return folder


def history(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "history.csv").open()))


def test_metrics_of_a_run_against_its_reference(tmp_path: Path) -> None:
    reference = write_run(tmp_path / "reference", outputs())
    run = write_run(tmp_path / "run", outputs(error=0.2))
    result = score(config(), run, reference)
    of_images = (*REFERENCE_METRICS, "differing_images", "class_accuracy", "frechet_distance")
    assert set(result) == {f"quality/{name}" for name in of_images} | ALWAYS
    assert (result["quality/images"], result["quality/differing_images"]) == (20, 20)
    assert result["quality/psnr_db"] == pytest.approx(20, abs=1e-4)  # 10 log10(2² / 0.2²)
    images = outputs()["images"].double()
    assert result["quality/relative_l2"] == pytest.approx((0.04 / images.square().mean().item()) ** 0.5, rel=1e-5)
    assert (result["quality/exact"], result["quality/finite"]) == (0, 1)
    assert {file.name for file in (run / "images").iterdir()} == {"difference.png", "grid.png", "reference.png"}
    assert not (reference / "images").exists() and not (reference / "history.csv").exists()


def test_history_adds_the_error_of_each_state(tmp_path: Path) -> None:
    reference = write_run(tmp_path / "reference", outputs())
    run = write_run(tmp_path / "run", outputs(error=0.1))
    score(config("ssim"), run, reference)
    rows = history(run)
    assert list(rows[0]) == ["step", "step_ms", "host_gib", "device_gib", "relative_l2"]
    assert [row["step_ms"] for row in rows] == ["0.5", "1.0", "1.5"]
    assert [float(row["relative_l2"]) for row in rows] == pytest.approx([0.1, 0.2, 0.3])  # states are 1 + 0.1 step


def test_run_against_itself_is_exact(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", outputs())
    result = score(config(), run, run)
    assert result["quality/psnr_db"] is None and result["quality/exact"] == 1
    assert result["quality/relative_l2"] == 0 and result["quality/cosine"] == 1
    assert result["quality/ssim"] == pytest.approx(1, abs=1e-12)
    assert {float(row["relative_l2"]) for row in history(run)} == {0.0}


def test_only_the_named_metrics(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", outputs())
    assert set(score(config("cosine"), run, run)) == {"quality/cosine", *ALWAYS}
    assert set(score(config("class_accuracy"), run, run)) == {"quality/class_accuracy", *ALWAYS}


def test_without_a_reference_only_the_sources_scores(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", outputs())
    result = score(config(), run, None)
    assert set(result) == {f"quality/{name}" for name in ("finite", "images", "class_accuracy", "frechet_distance")}
    assert [file.name for file in (run / "images").iterdir()] == ["grid.png"]
    assert list(history(run)[0]) == ["step", "step_ms", "host_gib", "device_gib"]


def test_scores_that_are_no_numbers_or_not_defined_are_null(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = {"class_accuracy": float("inf")}
    source = SimpleNamespace(scores=lambda outputs: scores, sample_scores=lambda outputs: {})
    monkeypatch.setattr("qexp.scoring.score.load_source", lambda config: source)
    result = score(config(), write_run(tmp_path / "run", outputs()), None)
    undefined = {"quality/class_accuracy": None, "quality/frechet_distance": None}
    assert result == {"quality/finite": 1, "quality/images": 20, **undefined}


def test_scoring_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    reference = write_run(tmp_path / "reference", outputs())
    run = write_run(tmp_path / "run", outputs(error=0.01))

    def once() -> tuple[str, dict[str, bytes]]:
        text = json.dumps(score(config(), run, reference), allow_nan=False)
        return text, {str(path): path.read_bytes() for path in run.rglob("*") if path.is_file()}

    assert once() == once()


def test_broken_images_show_as_broken(tmp_path: Path) -> None:
    reference = write_run(tmp_path / "reference", outputs())
    values = outputs(error=0.1)
    values["images"][4, 0, 1, 1] = torch.nan
    values["trajectory"][2, 4] = torch.inf
    run = write_run(tmp_path / "run", values)
    result = score(config(), run, reference)
    assert result["quality/finite"] == 0 and result["quality/exact"] == 0
    assert [result[f"quality/{name}"] for name in (*REFERENCE_METRICS, "frechet_distance")] == [None] * 5
    accuracy = result["quality/class_accuracy"]
    assert accuracy is not None and 0 <= accuracy <= 0.95  # 19 of 20 images at best
    json.dumps(result, allow_nan=False)
    assert [row["relative_l2"] == "" for row in history(run)] == [False, False, True]


def test_broken_reference_is_not_the_runs_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = outputs()
    values["images"][0] = torch.nan
    reference = write_run(tmp_path / "reference", values)
    result = score(config(), write_run(tmp_path / "run", outputs()), reference)
    assert result["quality/finite"] == 1 and result["quality/psnr_db"] is None
    assert "the reference has 64 values that are not finite" in capsys.readouterr().err


def test_other_tasks_have_nothing_to_score(tmp_path: Path) -> None:
    assert score(config(task=RoundtripConfig()), tmp_path, None) == {}


def test_unknown_metric_lists_the_choices() -> None:
    with pytest.raises(
        ConfigError, match=r"=psnr is unknown.*; use answer_accuracy, class_accuracy, .* or top1_agreement"
    ):
        MetricsConfig(("ssim", "psnr"))


def test_missing_and_damaged_outputs(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", outputs())
    with pytest.raises(LoadError, match=r"nowhere/outputs\.safetensors is missing"):
        score(config(), run, tmp_path / "nowhere")
    (run / "outputs.safetensors").write_bytes((run / "outputs.safetensors").read_bytes()[:-7])
    with pytest.raises(LoadError, match=r"run/outputs\.safetensors is damaged"):
        score(config(), run, None)


def test_files_that_do_not_fit_each_other(tmp_path: Path) -> None:
    reference = write_run(tmp_path / "reference", outputs(count=10))
    with pytest.raises(LoadError, match=r"images of shape \(20, 1, 8, 8\).*\(10, 1, 8, 8\)"):
        score(config(), write_run(tmp_path / "run", outputs()), reference)
    with pytest.raises(LoadError, match=r"memory\.csv has 2 rows, but the saved trajectory 3 steps"):
        score(config(), write_run(tmp_path / "other", outputs(), rows=2), None)


@pytest.mark.parametrize(
    ("kind", "outputs", "count"),
    [
        ("images", {"images": [0.0, math.nan], "latents": [math.inf, 1.0], "trajectory": [math.nan, 1.0]}, 2),
        ("text", {"nonfinite": [0, 3], "nll": [1.0, -math.inf], "tokens": [1, 2]}, 4),
        ("outputs", {"hidden": [0.0, math.nan], "logits.0": [math.nan, math.nan]}, 3),
    ],
)
def test_what_is_not_finite_is_counted_and_said(
    kind: str, outputs: dict[str, list[float]], count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = {name: torch.tensor(values) for name, values in outputs.items()}
    assert _count_nonfinite(kind, {name: torch.zeros(2) for name in outputs}) == 0
    assert _count_nonfinite(kind, tensors) == count
    _warn_of_nonfinite(kind, 0, 0)
    assert capsys.readouterr().err == ""
    _warn_of_nonfinite(kind, count, 0)
    assert f"warning: {count} " in capsys.readouterr().err
    _warn_of_nonfinite(kind, 0, count)
    assert f"the reference has {count} " in capsys.readouterr().err
