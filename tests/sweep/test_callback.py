"""The callback inside real Hydra sweeps (of `hydra_app.py`), and how it counts them beforehand."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from omegaconf import OmegaConf

from qexp.results.manifest import JobRow, Manifest
from qexp.sweep.callback import SweepCallback, planned_jobs, swept_settings
from qexp.sweep.run_key import run_key
from tests.sweep import hydra_app
from tests.sweep.settings import run_config

ROOT = Path(__file__).parents[2]


def sweep(tmp_path: Path, *arguments: str, folder: str = "conf") -> subprocess.CompletedProcess[str]:
    command = command_of(tmp_path, *arguments, folder=folder)
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def start_sweep(tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    command = command_of(tmp_path, *arguments)
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def command_of(tmp_path: Path, *arguments: str, folder: str = "conf") -> list[str]:
    command = [sys.executable, "-m", "tests.sweep.hydra_app", str(tmp_path / folder), *arguments]
    return [*command, f"paths.outputs={tmp_path / 'outputs'}"]


def wait_until(condition: Callable[[], bool], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def test_a_sweep_goes_on_after_failures_and_exits_with_one(tmp_path) -> None:
    done = sweep(tmp_path, "-m", "behaviour=1,2,11,4", "seed=0,1", "sweep.notes=why")
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "8 experiments: 2 done, 2 unsupported, 4 failed"
    assert any(line.startswith("[3/8]") and "behaviour=2, seed=0: failed (error)" in line for line in lines)
    assert sum("(exit)" in line and line.startswith("[") for line in lines) == 2
    assert any(line.startswith("[8/8]") and line.endswith("(2 done, 4 failed, 0 left)") for line in lines)
    (below,) = [line for line in lines if line.startswith("#3 ")]
    assert below.split(" · ")[4].startswith("behaviour=2, seed=0: failed: error: ")  # below the table
    values = Manifest(tmp_path / "outputs", "test").read()
    assert values["total"] == 8 and values["notes"] == "why" and values["finished"]
    assert values["command"][:6] == ["python", "-m", "qexp", "-m", "behaviour=1,2,11,4", "seed=0,1"]
    assert values["jobs"][2]["overrides"][:2] == ["behaviour=2", "seed=0"]


@pytest.mark.exhaustive
def test_a_sweep_without_failures_exits_with_zero_and_the_next_one_reuses_it(tmp_path) -> None:
    first = sweep(tmp_path, "-m", "behaviour=1,4")
    assert first.returncode == 0, first.stderr
    second = sweep(tmp_path, "-m", "behaviour=1,4,3")
    assert second.returncode == 1
    assert second.stdout.splitlines()[-1] == "3 experiments: 1 done (1 reused), 1 unsupported, 1 failed"


def test_outputs_that_cannot_be_written_stop_a_sweep_before_it_starts(tmp_path) -> None:
    (tmp_path / "outputs").write_text("a file")
    done = sweep(tmp_path, "-m", "behaviour=1,2")
    assert done.returncode == 1
    assert "cannot be written" in done.stderr and "paths.outputs" in done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""


def config(*task: str, target: str = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper", **params: str):
    hydra = {"sweeper": {"_target_": target, "params": params or None}, "overrides": {"task": list(task)}}
    return OmegaConf.create({"hydra": hydra})


@pytest.mark.parametrize(
    "composed, jobs",
    [
        (config("backend=none,torchao", "offload=none,leaf,block", "offload.to=disk"), 6),
        (config("seed=range(5)", "+x=choice(1,2)", "y=[1,2]"), 10),
        (config("seed=1"), 1),
        (config("seed=3", backend="a,b", seed="1,2"), 2),  # the command line wins over a preset
        (config("backend=glob(*)"), None),
        (config("seed=1,2", target="hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper"), None),
    ],
)
def test_the_number_of_planned_experiments(composed, jobs) -> None:
    assert planned_jobs(composed) == jobs


OPTUNA = "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper"


@pytest.mark.parametrize(
    ("composed", "names"),
    [
        (config("backend=none,torchao", "offload=leaf", "seed=range(3)"), ["backend", "seed"]),
        (config("backend.x=choice(1)", "+backend.y=1,2", "z=[1,2]"), ["backend.y"]),  # a choice of one does not vary
        (config("seed=3", backend="a,b", seed="1,2"), ["backend"]),  # the command line wins over a preset
        (config("backend=glob(*)"), ["backend"]),
        (config("lr=interval(0,1)", target=OPTUNA, seed="range(1,4)"), ["seed", "lr"]),
        (config("seed=1,2", "x=["), ["seed"]),  # the sweeper reports what cannot be read
    ],
)
def test_names_of_swept_settings(composed, names) -> None:
    assert swept_settings(composed) == names


def finished(tmp_path: Path, total: int, *statuses: str):
    manifest = Manifest(tmp_path, "s")
    manifest.start([], total)
    for number, status in enumerate(statuses, 1):
        manifest.add(JobRow(number, "", (), "label", status))
    return OmegaConf.create({"paths": {"outputs": str(tmp_path)}, "sweep": {"name": "s"}})


def test_an_experiment_without_a_record_fails_the_sweep(tmp_path, capsys) -> None:
    with pytest.raises(SystemExit, match="1"):
        SweepCallback().on_multirun_end(finished(tmp_path, 2, "done"))
    assert "1 not run, or cut off" in capsys.readouterr().out


def test_a_table_that_cannot_be_made_does_not_hide_the_count_or_the_failure(tmp_path, capsys) -> None:
    composed = finished(tmp_path, 1, "failed")
    (tmp_path / "runs").mkdir()
    path = tmp_path / "sweeps" / "s" / "jobs.jsonl"
    path.write_text(path.read_text().replace('"overrides": []', '"overrides": null'))
    with pytest.raises(SystemExit, match="1"):
        SweepCallback().on_multirun_end(composed)
    captured = capsys.readouterr()
    assert "1 experiment: 0 done, 1 failed" in captured.out
    assert "Traceback" in captured.err


@pytest.mark.exhaustive
def test_of_24_experiments_six_die_each_in_its_way_and_the_next_sweep_runs_these(tmp_path) -> None:
    cases = "case=" + ",".join(map(str, range(24)))
    done = sweep(tmp_path, "-m", cases)
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines()[-1] == "24 experiments: 18 done, 6 failed"
    jobs = Manifest(tmp_path / "outputs", "test").read()["jobs"]
    assert [job["reason"] for job in jobs if job["status"] == "failed"] == list(hydra_app.DEATHS.values())
    assert [job["number"] for job in jobs if job["status"] == "failed"] == [4, 8, 12, 16, 20, 24]
    assert not list((tmp_path / "outputs").rglob("*.tmp"))
    results = {path.parent.name for path in (tmp_path / "outputs/runs").glob("*/result.json")}
    assert results == {job["key"] for job in jobs if job["status"] == "done"}
    ran = (tmp_path / "outputs/ran.txt").read_text().splitlines()

    again = sweep(tmp_path, "-m", cases)
    assert again.returncode == 1
    assert again.stdout.splitlines()[-1] == "24 experiments: 18 done (18 reused), 6 failed"
    more = (tmp_path / "outputs/ran.txt").read_text().splitlines()[len(ran) :]
    assert more == [f"runs/{job['key']}" for job in jobs if job["status"] == "failed"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("victim", ["parent", "fork_server"])
def test_sweep_of_24_that_loses_a_process_in_the_middle_loses_nothing_else(victim: str, tmp_path) -> None:
    """The process is killed while the experiment that hangs, the 20th, runs."""
    cases = "case=" + ",".join(map(str, range(24)))
    hanging = run_key(run_config(tmp_path, 16, seed=10 + 19))
    first = start_sweep(tmp_path, "-m", cases)
    wait_until((tmp_path / "outputs/runs" / hanging / "started").exists)
    (server,) = psutil.Process(first.pid).children()
    family = [server, *server.children()]
    assert len(family) == 2 and "qexp.sweep.fork_server" in server.cmdline()
    os.kill(first.pid if victim == "parent" else server.pid, signal.SIGKILL)
    output = first.communicate(timeout=300)[0]
    wait_until(lambda: not any(process.is_running() and process.status() != "zombie" for process in family))
    ran = (tmp_path / "outputs/ran.txt").read_text().splitlines()
    if victim == "parent":
        assert first.returncode == -signal.SIGKILL and ran[-1] == f"runs/{hanging}"
    else:
        assert "what it was running is run again" in output and ran.count(f"runs/{hanging}") == 2
        assert output.splitlines()[-1] == "24 experiments: 18 done, 6 failed"

    again = sweep(tmp_path, "-m", cases)
    reused = 15 if victim == "parent" else 18  # of the first 19, four died
    assert again.stdout.splitlines()[-1] == f"24 experiments: 18 done ({reused} reused), 6 failed"
    jobs = Manifest(tmp_path / "outputs", "test").read()["jobs"]
    assert [job["reason"] for job in jobs if job["status"] == "failed"] == list(hydra_app.DEATHS.values())
    done = {f"runs/{job['key']}" for job in jobs if job["status"] == "done"}
    ran = (tmp_path / "outputs/ran.txt").read_text().splitlines()
    assert len(done) == 18 and all(ran.count(run) == 1 for run in done)
    assert {f"runs/{path.parent.name}" for path in (tmp_path / "outputs/runs").glob("*/result.json")} == done
    assert all(json.loads(path.read_text()) for path in (tmp_path / "outputs").rglob("*.json"))
    assert not [path for path in (tmp_path / "outputs").rglob(".*") if path.name != ".lock"]


@pytest.mark.exhaustive
def test_two_sweeps_at_once_run_each_experiment_once(tmp_path) -> None:
    cases = "case=" + ",".join(str(case) for case in range(16) if case % 4 != 3)
    run_config(tmp_path)  # makes the checkpoint
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(sweep, tmp_path, "-m", cases, f"sweep.name={name}", folder=name) for name in "ab"]
    assert [one.result().returncode for one in both] == [0, 0]
    ran = (tmp_path / "outputs/ran.txt").read_text().splitlines()
    assert len(ran) == len(set(ran)) == 24  # 12 runs and their references
