"""CONTRIBUTING.md is right: its files, put into a copy of the project, are plugins, and its commands run."""

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[2]
FILE = re.compile(r"^`(?P<path>[\w/.]+)`\n\n```\w+\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^\$ python -m (?P<arguments>.*)$", re.MULTILINE)
QUICK = ("tracking=none", "task.num_images=4", "task.num_inference_steps=2")


@pytest.fixture(scope="module")
def page() -> str:
    return (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def project(page: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with the files of the page, none of which replaces one that is there."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copy(ROOT / "pyproject.toml", folder)
    for name in ("qexp", "conf", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    files = {match["path"]: match["text"] for match in FILE.finditer(page)}
    folders = ["qexp/quantizers", "conf/backend", "qexp/metrics", "qexp/models", "conf/model"]
    assert [Path(path).parent.as_posix() for path in files] == folders
    for path, text in files.items():
        assert not (folder / path).exists()
        (folder / path).write_text(text, encoding="utf-8")
    return folder


def run(project: Path, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(project)}
    command = [sys.executable, "-m", *arguments]
    child = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stdout + child.stderr
    return child.stdout


def results(project: Path) -> list[dict[str, float]]:
    files = sorted(project.glob("outputs/runs/*/result.json"), key=lambda path: path.stat().st_mtime)
    return [json.loads(path.read_text())["metrics"] for path in files]


def formula_sqnr_db(weight: torch.Tensor) -> float:
    """Of the format as the page states it, for 8 bits; the result is rounded to the weight's own dtype."""
    dense = weight.double()
    scale = dense.abs().amax(dim=1, keepdim=True) / 127
    restored = ((dense / scale).round() * scale).to(weight.dtype).double()
    return float(10 * torch.log10(dense.square().sum() / (dense - restored).square().sum()))


def test_help_lists_the_backend(project: Path) -> None:
    assert re.search(r"^ +rowwise +Row-wise int8", run(project, "qexp", "--help"), re.MULTILINE)


def commands(page: str, word: str) -> list[list[str]]:
    """The commands of the page that are about one of its plugins."""
    found = [shlex.split(match["arguments"]) for match in COMMAND.finditer(page)]
    return [command for command in found if any(word in argument for argument in command)]


def test_round_trip_of_the_page_has_the_error_of_the_formula(page: str, project: Path) -> None:
    round_trip, _, _ = commands(page, "rowwise")

    run(project, *round_trip, "tracking=none")
    (layers,) = project.glob("outputs/runs/*/layers.csv")
    weights = load_file(next((ROOT / "qexp/assets/digits").glob("diffusion*.safetensors")))
    rows = list(csv.DictReader(layers.open(encoding="utf-8")))
    assert len(rows) > 20
    for row in rows:
        weight = weights[f"{row['layer']}.weight"]
        assert float(row["sqnr_db"]) == pytest.approx(formula_sqnr_db(weight), abs=0.01)
        assert float(row["bits_per_weight"]) == pytest.approx(8 + 32 / weight.shape[1])


@pytest.mark.exhaustive
def test_sweep_and_contract_of_the_page_run(page: str, project: Path) -> None:
    _, sweep, contract = commands(page, "rowwise")
    run(project, *sweep, *QUICK)
    first, second = results(project)[-2:]
    errors = {metrics["quality/relative_l2"] for metrics in (first, second)}
    assert 0 < min(errors) < 0.1 * max(errors)  # five bits fewer: some 30 times the error
    assert all(metrics["offload/at_rest_device_gib"] == 0 for metrics in (first, second))

    assert int(re.findall(r"(\d+) passed", run(project, *contract))[0]) > 5


def test_a_wrong_field_is_answered_by_the_backend(project: Path) -> None:
    with pytest.raises(AssertionError, match=r"backend\.bits=9 must be from 2 to 8"):
        run(project, "qexp", "backend=rowwise", "backend.bits=9")


@pytest.mark.exhaustive
def test_the_metric_of_the_page_is_in_table_csv_plot_and_wandb(page: str, project: Path) -> None:
    sweep, report = commands(page, "errors")
    run(project, *sweep, *(one for one in QUICK if one != "tracking=none"))
    printed = run(project, *report, "--wandb")
    int8, int2 = (metrics["quality/mae"] for metrics in results(project)[-2:])
    assert 0 < int8 < int2 < 2
    assert "MAE" in printed and f"{int8:.4f}" in printed and f"{int2:.4f}" in printed
    folder = project / "outputs/sweeps/errors"
    with (folder / "results.csv").open(encoding="utf-8") as stream:
        assert [float(row["quality/mae"]) for row in csv.DictReader(stream)] == [int8, int2]
    assert (folder / "pareto_mae.png").stat().st_size > 10_000
    assert "summary:quality/mae" in (folder / "wandb_report.json").read_text(encoding="utf-8")


@pytest.mark.exhaustive
def test_model_source_of_the_page_generates_as_its_formula_and_is_measured(page: str, project: Path) -> None:
    generate, round_trip = commands(page, "generator")
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 64), torch.nn.Tanh()
    ).requires_grad_(False)
    (project / "generator").mkdir()
    save_file(network.state_dict(), project / "generator/model.safetensors")
    (project / "generator/config.json").write_text('{"latent": 64, "width": 128}')

    before = set((project / "outputs/runs").glob("*"))
    run(project, *generate, "tracking=none", "backend=none", "seed=5")
    (folder,) = set((project / "outputs/runs").glob("*")) - before
    outputs = folder / "outputs.safetensors"
    noise = torch.randn(8, 64, generator=torch.Generator().manual_seed(5))
    assert torch.equal(load_file(outputs)["images"], network(noise).view(8, 1, 8, 8))
    metrics = results(project)[-1]
    assert metrics["quality/exact"] == 1 and metrics["offload/transferred_gib"] > 0

    run(project, *round_trip, "tracking=none")
    assert results(project)[-1]["roundtrip/layers"] == 2
