import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from qexp.config.schema import IsolationConfig
from qexp.results.run_folder import RunFolder
from qexp.sweep.worker import Work, do_work, seeded_experiment
from qexp.system.files import write_text
from tests.products import exhaustive
from tests.sweep import fake_experiment
from tests.sweep.fake_experiment import FAKES
from tests.sweep.settings import run_config

ROOT = Path(__file__).parents[2]


def prepared(tmp_path: Path, behaviour: int = 1) -> Path:
    folder = tmp_path / "outputs" / "runs" / "key"
    write_text(folder / "config.yaml", yaml.safe_dump(run_config(tmp_path, behaviour).to_container()))
    fake_experiment.write_outputs(tmp_path / "reference", "none")
    return folder


def worker(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qexp.sweep.worker", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_its_command_line_says_what_the_parent_ordered(tmp_path) -> None:
    folder = prepared(tmp_path)
    done = worker(*Work(folder, "run", **FAKES).arguments())
    assert done.returncode == 0, done.stderr
    assert RunFolder(folder).read_result()["scored"] is None
    done = worker(*Work(folder, "score", reference=tmp_path / "reference", **FAKES).arguments())
    assert done.returncode == 0, done.stderr
    result = RunFolder(folder).read_result()
    assert result["scored"] == {"names": ["psnr_db"]} and result["metrics"]["quality/psnr_db"] == 1.0
    assert (tmp_path / "outputs" / "ran.txt").read_text().count("\n") == 1


@pytest.mark.parametrize("behaviour, code", [exhaustive(1, 0), (2, 1), (4, 1), (11, 1)])  # 0 is above
def test_its_exit_code_is_zero_only_for_done(behaviour, code, tmp_path) -> None:
    work = Work(prepared(tmp_path, behaviour), reference=tmp_path / "reference", **FAKES)
    assert worker(*work.arguments()).returncode == code


def test_it_does_not_start_without_the_parent_it_was_told_of(tmp_path) -> None:
    folder = prepared(tmp_path)
    assert worker(*Work(folder, **FAKES).arguments(), "--parent", 1).returncode == 1
    assert RunFolder(folder).read_status() is None


def test_inline_the_memory_of_the_process_is_absent_and_noted(tmp_path, monkeypatch) -> None:
    peaks = {"load/peak_host_gib": 0.5, "memory/run_peak_host_gib": 0.6, "load/peak_device_gib": 0.7}
    monkeypatch.setattr(fake_experiment, "METRICS", fake_experiment.METRICS | peaks)
    folder = prepared(tmp_path)
    for mode, hosts in (("process", (0.5, 0.6)), ("inline", (None, None))):
        config = run_config(tmp_path, isolation=IsolationConfig(mode=mode))
        write_text(folder / "config.yaml", yaml.safe_dump(config.to_container()))
        do_work(Work(folder, "run", **FAKES))
        result = RunFolder(folder).read_result()
        metrics = result["metrics"]
        assert (metrics["load/peak_host_gib"], metrics["memory/run_peak_host_gib"]) == hosts
        assert metrics["load/peak_device_gib"] == 0.7 and metrics["memory/weights_gib"] == 0.25
        assert set(result["notes"]) == ({*[*peaks][:2]} if mode == "inline" else set())
    do_work(Work(folder, "score", reference=tmp_path / "reference", **FAKES))
    assert all("isolation=process" in note for note in RunFolder(folder).read_result()["notes"].values())


def test_scoring_what_never_ran_is_an_error_and_runs_nothing(tmp_path) -> None:
    status = do_work(Work(prepared(tmp_path), "score", reference=tmp_path / "reference", **FAKES))
    assert (status.status, status.reason) == ("failed", "load") and "--score-only" in status.message
    assert not (tmp_path / "outputs" / "ran.txt").exists()


def test_a_damaged_configuration_is_a_failure_with_a_reason(tmp_path) -> None:
    folder = prepared(tmp_path)
    write_text(folder / "config.yaml", "seed: many")
    status = do_work(Work(folder, **FAKES))
    assert (status.status, status.reason) == ("failed", "config")


def test_values_that_json_lacks_become_null_and_a_warning(tmp_path, capsys) -> None:
    work = Work(prepared(tmp_path), "run", experiment="tests.sweep.fake_experiment:run_infinite")
    assert do_work(work).status == "done"
    metrics = RunFolder(work.folder).read_result()["metrics"]
    assert metrics == {"a/inf": None, "a/nan": None, "a/none": None, "a/one": 1.0}
    assert "a/inf is inf" in (error := capsys.readouterr().err) and "a/nan is nan" in error and "a/none" not in error


def test_the_program_s_experiment_starts_from_the_configured_seed(tmp_path, monkeypatch) -> None:
    import random

    import numpy as np
    import torch

    monkeypatch.setitem(sys.modules, "qexp.experiments.run", type(sys)("fake"))
    sys.modules["qexp.experiments.run"].run_experiment = lambda config, folder: {
        "x": random.random() + float(np.random.rand()) + torch.rand(()).item()
    }
    config = run_config(tmp_path)
    first, again = seeded_experiment(config, tmp_path), seeded_experiment(config, tmp_path)
    other = seeded_experiment(run_config(tmp_path, seed=2**40), tmp_path)
    assert first == again != other
