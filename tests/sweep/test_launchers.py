"""The same sweep under the launchers basic, joblib and submitit, and under the sweeper optuna: the real program."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from qexp.metrics.registry import find_metric

SMALL = ["device=cpu", "tracking=none", "task.num_images=1", "task.num_inference_steps=2", "sweep.name=s"]
SWEEP = ["backend=packed_uint4,packed_uint2", "skip_modules=[proj_out],[heads]"]  # there are no heads
PLUGINS = {
    "joblib": "hydra_plugins.hydra_joblib_launcher",
    "submitit_local": "hydra_plugins.hydra_submitit_launcher",
    "optuna": "hydra_plugins.hydra_optuna_sweeper",
}


def need(plugin: str) -> None:
    if find_spec(PLUGINS[plugin]) is None:
        pytest.skip(f"{PLUGINS[plugin].partition('.')[2]} is not installed")


def sweep(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    folder.mkdir()
    command = [sys.executable, "-m", "qexp", "-m", *arguments, *SMALL]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


def outcome(folder: Path) -> dict[str, Any]:
    """What does not depend on who launches: jobs of the manifest, and the metrics of each run folder."""
    jobs = json.loads((folder / "outputs/sweeps/s/manifest.json").read_text())["jobs"]
    rows = [[job[name] for name in ("number", "key", "label", "status", "reason")] for job in jobs]
    metrics = {}
    for path in sorted(folder.glob("outputs/runs/*/result.json")):
        found = json.loads(path.read_text())["metrics"].items()
        metrics[path.parent.name] = {n: v for n, v in found if (one := find_metric(n)) is None or not one.varies}
    return {"jobs": rows, "folders": sorted(path.name for path in folder.glob("outputs/runs/*")), "metrics": metrics}


@pytest.fixture(scope="module")
def basic(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("basic") / "sweep"
    return folder, sweep(folder, *SWEEP)


@pytest.mark.external
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_launcher_leaves_the_folders_table_and_exit_code_of_the_basic_one(
    launcher: str, basic: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    need(launcher)
    done = sweep(tmp_path / "sweep", *SWEEP, f"hydra/launcher={launcher}")
    assert done.returncode == basic[1].returncode == 1, done.stderr
    expected = outcome(basic[0])
    assert [row[3] for row in expected["jobs"]] == ["done", "failed", "done", "failed"]
    assert all(expected["metrics"].values()) and len(expected["metrics"]) == 2
    assert outcome(tmp_path / "sweep") == expected
    assert done.stdout.splitlines()[-1] == "4 experiments: 2 done, 2 failed"


@pytest.mark.external
def test_dry_run_under_another_launcher_counts_and_writes_nothing(tmp_path: Path) -> None:
    need("joblib")
    done = sweep(tmp_path / "sweep", *SWEEP, "hydra/launcher=joblib", "sweep.dry_run=true")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1].startswith("4 experiments: 2 would run, 2 cannot run")
    assert not list((tmp_path / "sweep").iterdir())


@pytest.mark.external
def test_optuna_finds_the_larger_format_by_its_psnr(tmp_path: Path) -> None:
    need("optuna")
    search = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=4", "hydra.sweeper.n_jobs=1", SWEEP[0]]
    search += ["hydra.sweeper.sampler.seed=1", "sweep.objectives=[quality/psnr_db]"]
    wrong = sweep(tmp_path / "wrong", *search)
    assert wrong.returncode == 1 and "set it to maximize" in wrong.stderr
    assert not list((tmp_path / "wrong").iterdir())
    done = sweep(tmp_path / "sweep", *search, "hydra.sweeper.direction=maximize")
    assert done.returncode == 0, done.stderr
    found = (tmp_path / "sweep/outputs/sweeps/s/optimization_results.yaml").read_text()
    assert "backend: packed_uint4" in found
