"""The parent's side, with real worker processes around the experiments of `fake_experiment.py`."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import yaml

from qexp.config.schema import IsolationConfig, MetricsConfig, RunConfig, SaveConfig, SweepConfig, TrackingConfig
from qexp.errors import ConfigError
from qexp.experiments.reference import reference_config
from qexp.experiments.stored import run_config_from_container
from qexp.report.table import rows_of_sweep
from qexp.results import manifest
from qexp.results.manifest import Manifest
from qexp.results.run_folder import RunFolder, Status, now_iso
from qexp.results.saved_files import note_saved
from qexp.sweep import job, reference, worker, worker_process
from qexp.sweep.job import JobRow, refuse_job, run_job
from qexp.sweep.run_key import reference_key, run_key
from qexp.system import files
from qexp.tasks.roundtrip import RoundtripConfig
from tests.products import exhaustive
from tests.sweep import fake_experiment
from tests.sweep.fake_experiment import FAKES
from tests.sweep.settings import run_config
from tests.waiting import wait_for

ROOT = Path(__file__).parents[2]
INLINE = IsolationConfig(mode="inline")


def run(config: RunConfig, **options) -> JobRow:
    return run_job(config, ["task.num_images=1"], **(FAKES | options))


def skipping(config: RunConfig, pattern: str) -> RunConfig:
    """Another candidate with the same reference."""
    component = replace(config.components["transformer"], skip_modules=(pattern,))
    return replace(config, components={"transformer": component})


def folder_of(config: RunConfig) -> RunFolder:
    return RunFolder(Path(config.paths.outputs, "runs", run_key(config)))


def reference_of(config: RunConfig) -> RunFolder:
    return RunFolder(Path(config.paths.outputs, "references", reference_key(config)))


def ran(config: RunConfig) -> list[str]:
    """What ran so far: 'runs/<key>' and 'references/<key>', in order."""
    path = Path(config.paths.outputs, "ran.txt")
    return path.read_text().splitlines() if path.exists() else []


def have_reference(config: RunConfig) -> RunConfig:
    """Put a finished reference there, so that a test need not run one."""
    folder = reference_of(config)
    fake_experiment.write_outputs(folder.path, "none")
    folder.write_status(Status("done", 1, now_iso(), finished=now_iso()))
    return config


def track_by(log_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a function called for each run that is tracked, in place of wandb."""
    fake = SimpleNamespace(log_run=log_run)
    monkeypatch.setitem(sys.modules, "qexp.tracking.wandb_run", fake)  # type: ignore[arg-type]


def test_a_first_run_runs_its_reference_and_leaves_everything(tmp_path, capfd) -> None:
    config = run_config(tmp_path)
    row = run(config)
    folder, key = folder_of(config), run_key(config)
    assert (row.status, row.reason, row.reused, row.key) == ("done", None, False, key)
    assert row.label == "digits checkpoint · bitsandbytes · none · generate"
    assert row.metrics == {**fake_experiment.METRICS, "quality/psnr_db": 1.0}
    assert ran(config) == [f"references/{reference_key(config)}", f"runs/{key}"]

    result = folder.read_result()
    assert {name: result[name] for name in ("schema", "key", "status")} == {"schema": 1, "key": key, "status": "done"}
    assert result["metrics"] == row.metrics
    assert result["scored"] == {"names": ["psnr_db"]}
    assert result["reference"] == reference_key(config)
    stored = replace(config, loader=replace(config.loader, cache=None))  # nothing to share in a single run
    assert run_config_from_container(result["config"]) == stored
    assert run_config_from_container(yaml.safe_load((folder.path / "config.yaml").read_text())) == stored
    assert (folder.path / "overrides.txt").read_text() == "task.num_images=1\n"
    assert json.loads((folder.path / "env.json").read_text()) == result["env"]
    status = folder.read_status()
    assert status.status == "done" and status.pid != os.getpid() and status.finished >= status.started

    # nothing to compare with: no quality
    assert reference_of(config).read_result()["metrics"] == fake_experiment.METRICS
    assert "done in" in capfd.readouterr().out


@pytest.mark.parametrize("mode", ["process", "inline"])
@pytest.mark.parametrize(
    ("pattern", "reason", "message"),
    [
        ("heads", "config", "^skip_modules: 'heads'"),
        exhaustive("tails", "error", "shape is wrong; traceback in"),
        exhaustive("exit", "exit", r"sys\.exit\(3\)"),
        ("killed", "signal", "out-of-memory killer"),
    ],
)
def test_a_mistake_is_found_before_the_reference_runs(pattern, reason, message, mode, tmp_path) -> None:
    if (pattern, mode) == ("killed", "inline"):
        pytest.skip("would kill the tests")
    good = run_config(tmp_path, isolation=IsolationConfig(mode=mode))
    config = skipping(good, pattern)
    row = run(config)
    assert (row.status, row.reason) == ("failed", reason) and re.search(message, row.message)
    assert ran(config) == []
    stored = folder_of(config).read_status()
    assert (stored.status, stored.reason, stored.message) == (row.status, row.reason, row.message)
    if pattern != "killed":
        assert "Traceback" in (folder_of(config).path / "worker.log").read_text()
    assert reference_key(config) == reference_key(good)
    assert run(good, number=2).status == "done"  # in the same sweep too
    assert ran(good) == [f"references/{reference_key(good)}", f"runs/{run_key(good)}"]


def test_a_refused_experiment_leaves_the_reference_as_it_is(tmp_path) -> None:
    good = run_config(tmp_path, isolation=INLINE)
    assert run(good).status == "done"
    config = replace(skipping(good, "heads"), resume="none")
    assert run(config).status == "failed"
    assert reference_of(good).read_status().status == "done" and reference_of(good).holds("outputs.safetensors")


def test_what_is_scored_again_is_not_checked(tmp_path, monkeypatch) -> None:
    """Its outputs are there: it need not run any more."""
    config = run_config(tmp_path, isolation=INLINE)
    assert run(config).status == "done"
    shutil.rmtree(tmp_path / "outputs/references")
    monkeypatch.setattr(fake_experiment, "check", lambda *_: pytest.fail("checked"))
    again = run(replace(config, metrics=MetricsConfig(names=("psnr_db", "ssim"))))
    assert (again.status, again.rescored) == ("done", True)


def test_a_result_survives_what_can_be_known_before(tmp_path, monkeypatch) -> None:
    config = have_reference(run_config(tmp_path, isolation=INLINE))
    run(config)
    before = folder_of(config).read_result()

    def refuse(config: RunConfig) -> str:
        raise ConfigError("set model.reference_path")

    monkeypatch.setattr(job, "reference_key", refuse)
    row = run(replace(config, resume="none"))
    assert (row.status, row.reason, row.message) == ("failed", "config", "set model.reference_path")
    assert folder_of(config).read_result() == before
    assert folder_of(config).read_status().status == "done"


ENDINGS = {
    2: ("failed", "error", "RuntimeError: a tensor is wrong in two lines; traceback in "),
    3: ("failed", "config", "backend.x=1 must be 2"),
    4: ("unsupported", "unsupported", "needs a GPU"),
    5: ("failed", "load", "checkpoint is truncated"),
    6: ("failed", "oom", "out of memory"),
    7: ("failed", "oom", "Tried to allocate 20 GiB"),
    8: ("failed", "oom", "can't allocate memory"),
    9: ("failed", "disk", "No space left on device"),
    10: ("failed", "disk", "Permission denied"),
    11: ("failed", "exit", "sys.exit(3)"),
    12: ("failed", "exit", "code 4"),
    13: ("failed", "signal", "out-of-memory killer"),
    14: ("failed", "signal", "SIGSEGV in native code; its output is in "),
    19: ("failed", "disk", "os error 28"),
}


@pytest.mark.parametrize("seed", [0, 1])
def test_weights_changed_while_an_experiment_runs_are_a_failure(seed: int, tmp_path) -> None:
    """Of the candidate with seed 0, of its reference with seed 1: neither result is of the files that its key names."""
    config = run_config(tmp_path, seed=seed)
    folder = folder_of(config)
    row = run(config, experiment=f"{fake_experiment.__name__}:run_while_weights_change")
    assert (row.status, row.reason) == ("failed", "load")
    assert "were changed while" in row.message and "run it again" in row.message
    assert run_key(config) != row.key == folder.key
    assert folder.read_status().status == "failed"


def test_mapped_file_that_is_truncated_is_named(tmp_path) -> None:
    config = have_reference(run_config(tmp_path))
    folder = folder_of(config)
    row = run(config, experiment=f"{fake_experiment.__name__}:run_while_its_file_is_cut")
    assert (row.status, row.reason) == ("failed", "signal")
    assert "SIGBUS" in row.message and "worker.log" in row.message
    file = tmp_path / "checkpoint/model.safetensors"
    assert f"a file that was changed while it ran: '{file}' is empty" in row.message
    assert folder.read_status().message == row.message


@pytest.mark.parametrize("behaviour", ENDINGS)
def test_every_ending_becomes_a_row_and_a_status(behaviour, tmp_path, capfd) -> None:
    config = have_reference(run_config(tmp_path, behaviour))
    row = run(config, number=1)
    status, reason, message = ENDINGS[behaviour]
    assert (row.status, row.reason) == (status, reason)
    assert message in row.message and "\n" not in row.message
    assert row.metrics == {} and not row.reused
    stored = folder_of(config).read_status()
    assert (stored.status, stored.reason, stored.message) == (status, reason, row.message)
    assert stored.finished is not None
    assert folder_of(config).read_result() is None
    (recorded,) = Manifest(config.paths.outputs, "test").read()["jobs"]
    assert (recorded["status"], recorded["reason"], recorded["key"]) == (status, reason, row.key)
    assert "Traceback" not in capfd.readouterr().out


def test_the_traceback_is_in_the_log_and_on_the_console_only_if_asked_for(tmp_path, capfd, monkeypatch) -> None:
    config = have_reference(run_config(tmp_path, 2))
    run(config)
    log = (folder_of(config).path / "worker.log").read_text()
    assert "Traceback" in log and "RuntimeError: a tensor is wrong" in log
    assert "Traceback" not in "".join(capfd.readouterr())
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    run(config)
    assert "Traceback" in "".join(capfd.readouterr())


def test_a_timeout_kills_the_worker_with_its_children_and_what_was_half_written(tmp_path) -> None:
    """Also a grandchild that leads a session of its own."""
    config = have_reference(run_config(tmp_path, 15, isolation=IsolationConfig(timeout_minutes=5.0 / 60)))
    started = time.monotonic()
    row = run(config)
    assert (row.status, row.reason) == ("failed", "timeout")
    assert "isolation.timeout_minutes" in row.message
    assert 4.9 < time.monotonic() - started < 300
    folder = folder_of(config)
    assert not psutil.pid_exists(folder.read_status().pid)
    for child in ("child.pid", "daemon.pid"):
        assert not is_running(int((folder.path / child).read_text()))
    left = {entry.name for entry in folder.path.iterdir()}
    assert not left & {"offload", ".outputs.safetensors.1.tmp", "result.json"}


@pytest.mark.parametrize("waits_for", ["its folder", "its reference"])
def test_a_timeout_bounds_the_wait_for_another_process(waits_for, tmp_path, capfd) -> None:
    config = run_config(tmp_path, isolation=IsolationConfig(timeout_minutes=0.3 / 60))
    taken = folder_of(config) if waits_for == "its folder" else reference_of(config)
    with taken.locked(print):
        started = time.monotonic()
        row = run(config)
        assert 0.3 <= time.monotonic() - started < 60
    assert (row.status, row.reason) == ("failed", "timeout") and str(taken.path) in row.message
    assert "isolation.timeout_minutes=0.005" in row.message and ran(config) == []
    captured = capfd.readouterr()
    assert "waiting for it to finish" in captured.out and "Traceback" not in captured.err
    status = folder_of(config).read_status()
    assert status is None if waits_for == "its folder" else status.reason == "timeout"
    with pytest.raises(ValueError), taken.locked(print, timeout_minutes=0.001):
        raise ValueError  # what happens with the lock in hand is nobody's timeout


def test_a_child_that_keeps_the_output_open_does_not_hold_up_the_sweep(tmp_path) -> None:
    config = have_reference(run_config(tmp_path, 17))
    started = time.monotonic()
    assert run(config).status == "done"
    assert time.monotonic() - started < 300  # the child sleeps for 600
    os.kill(int((folder_of(config).path / "child.pid").read_text()), signal.SIGKILL)


@pytest.mark.parametrize("mode", ["process", "inline"])
def test_output_goes_to_the_log_and_own_lines_to_the_console(mode, tmp_path, capfdbinary) -> None:
    config = have_reference(run_config(tmp_path, 18, isolation=IsolationConfig(mode=mode)))
    run(config)
    shown, log = capfdbinary.readouterr().out, (folder_of(config).path / "worker.log").read_bytes()
    assert "50 %\r100 %\rä 中\n".encode() in log
    assert "\ncandidate: ä 中\n".encode() in shown  # of a line that was rewritten, what stands last
    for printed in (b"50 %\r100 %\r\xff\n", b"to stderr\n"):
        assert printed in log and printed not in shown


def test_a_done_run_is_reused_and_says_so(tmp_path, capfd) -> None:
    config = have_reference(run_config(tmp_path))
    first = run(config)
    capfd.readouterr()
    second = run(config)
    assert (first.reused, second.reused) == (False, True)
    assert replace(second, reused=False) == first
    assert ran(config) == [f"runs/{first.key}"]
    assert "reused" in capfd.readouterr().out


def test_candidates_share_the_reference(tmp_path) -> None:
    one = run_config(tmp_path)
    assert run(one).status == run(skipping(one, "a")).status == "done"
    assert [name.partition("/")[0] for name in ran(one)] == ["references", "runs", "runs"]


def test_a_task_without_outputs_needs_no_reference_and_no_scoring(tmp_path) -> None:
    config = run_config(tmp_path, task=RoundtripConfig())
    row = run(config, experiment="tests.sweep.fake_experiment:run_roundtrip")
    assert row.status == "done" and row.metrics == {"roundtrip/sqnr_db_mean": 20.0}
    assert not (tmp_path / "outputs/references").exists()
    assert run(replace(config, metrics=MetricsConfig(names=("ssim",)))).reused


STORED = {"done": 1, "failed": 2, "unsupported": 4}
RUN_AGAIN = {  # resume -> the endings after which it runs once more
    "missing": {"failed", "unsupported"},
    "failed": {"failed"},
    "stale": {"failed", "unsupported"},
    "none": {*STORED},
}


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("mode", RUN_AGAIN)
def test_resume_modes(mode, stored, tmp_path) -> None:
    config = have_reference(run_config(tmp_path, STORED[stored], isolation=INLINE))
    first = run(config)
    assert first.status == stored
    second = run(replace(config, resume=mode))
    assert second.status == stored
    assert second.reused is (stored not in RUN_AGAIN[mode])
    runs = [name for name in ran(config) if name.startswith("runs/")]
    assert len(runs) == 1 + (stored in RUN_AGAIN[mode])
    assert len(ran(config)) - len(runs) == (mode == "none")


def test_resume_failed_leaves_alone_what_never_ran(tmp_path, capfd) -> None:
    config = run_config(tmp_path, resume="failed")
    row = run(config, number=1)
    assert (row.status, row.reused, row.key) == ("skipped", False, run_key(config))
    assert "resume=failed" in row.message
    assert not folder_of(config).path.exists()


@pytest.mark.parametrize(
    "change",
    [{"torch": "1.0"}, {"bitsandbytes": None}, {"qexp": "0.0"}, {"device_name": "other"}, {"host": "other"}]
    + [{name: "other"} for name in ("commit", "threads", "python", "cores")],
)
def test_resume_stale_runs_again_what_was_made_with_something_else(change, tmp_path, capfd, monkeypatch) -> None:
    config = have_reference(run_config(tmp_path, isolation=INLINE))
    run(config)
    folder = folder_of(config)
    result = folder.read_result()
    ((name, value),) = change.items()
    (result["env"]["versions"] if name in result["env"]["versions"] else result["env"])[name] = value
    folder.write_json("result.json", result)
    monkeypatch.setattr(job, "_SAID", set())
    capfd.readouterr()
    assert run(config).reused and run(config).reused  # resume=missing says so, once
    assert capfd.readouterr().out.count(f" {value} -> ") == 1
    row = run(replace(config, resume="stale"))
    assert not row.reused and row.status == "done"
    assert f"{value} -> " in capfd.readouterr().out


def test_a_running_status_whose_process_is_gone_is_a_failure(tmp_path) -> None:
    config = have_reference(run_config(tmp_path, isolation=INLINE))
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    folder_of(config).write_status(Status("running", gone.pid, now_iso()))
    row = run(replace(config, resume="failed"))
    assert (row.status, row.reused) == ("done", False)


def test_new_metrics_are_computed_without_running_again(tmp_path, capfd) -> None:
    config = have_reference(run_config(tmp_path))
    first = run(config)
    row = run(replace(config, metrics=MetricsConfig(names=("ssim", "cosine"))))
    assert ran(config) == [f"runs/{first.key}"]
    new = {"quality/ssim": 2.0, "quality/cosine": 2.0}  # scored together
    assert row.metrics == {**fake_experiment.METRICS, "quality/psnr_db": 1.0, **new}
    assert (row.key, row.seconds, row.rescored) == (first.key, first.seconds, True)
    assert folder_of(config).read_result()["scored"] == {"names": ["psnr_db", "ssim", "cosine"]}
    output = capfd.readouterr().out
    assert "scoring again (for ssim, cosine)" in output and output.count("done in") == 1
    assert run(replace(config, metrics=MetricsConfig(names=("cosine", "psnr_db")))).reused
    stored = yaml.safe_load((folder_of(config).path / "config.yaml").read_text())
    assert run_config_from_container(stored).metrics.names == ("psnr_db", "ssim", "cosine")


def test_all_is_scored_again_against_another_reference(tmp_path, monkeypatch) -> None:
    config = run_config(tmp_path)
    run(config)
    shutil.rmtree(tmp_path / "outputs/references")
    monkeypatch.setattr(reference, "reference_key", lambda config: "f" * 16)  # as after an upgrade of torch
    row = run(replace(config, metrics=MetricsConfig(names=("ssim",))))
    assert (row.metrics["quality/psnr_db"], row.metrics["quality/ssim"]) == (2.0, 2.0)


@pytest.mark.parametrize("file", ["outputs.safetensors", "memory.csv"])
def test_deleted_outputs_are_made_again_if_there_is_more_to_score(file, tmp_path) -> None:
    config = have_reference(run_config(tmp_path, isolation=INLINE))
    run(config)
    (folder_of(config).path / file).unlink()
    assert run(config).reused
    row = run(replace(config, metrics=MetricsConfig(names=("ssim",))))
    assert (row.status, row.reused, row.rescored) == ("done", False, False)
    assert ran(config) == [f"runs/{row.key}"] * 2


@pytest.mark.parametrize("resume", ["missing", "none"])
def test_a_reference_without_its_outputs_is_run_again(resume, tmp_path) -> None:
    config = run_config(tmp_path, isolation=INLINE)
    assert run(config).status == "done"
    (reference_of(config).path / "outputs.safetensors").unlink()
    assert run(replace(skipping(config, "a"), resume=resume)).status == "done"
    assert [name.partition("/")[0] for name in ran(config)] == ["references", "runs"] * 2


def test_scoring_again_makes_a_reference_whose_outputs_are_gone(tmp_path) -> None:
    config = run_config(tmp_path, isolation=INLINE)
    run(config)
    (reference_of(config).path / "outputs.safetensors").unlink()
    row = run(replace(config, metrics=MetricsConfig(names=("ssim",))))
    assert (row.status, row.rescored) == ("done", True)
    assert [name.partition("/")[0] for name in ran(config)] == ["references", "runs", "references"]


@pytest.fixture(params=["forward", "backward"])
def clock(request, monkeypatch) -> None:
    """The clock of the machine, which runs, or is set back an hour whenever somebody looks."""
    if request.param == "backward":
        hours, noon = itertools.count(), datetime(2026, 1, 2, 12, tzinfo=UTC)
        for module in (job, worker, manifest):
            earlier = lambda: (noon - timedelta(hours=next(hours))).isoformat(timespec="milliseconds")  # noqa: E731
            monkeypatch.setattr(module, "now_iso", earlier)


def test_resume_none_runs_the_reference_again_once_a_sweep(tmp_path, clock) -> None:
    config = run_config(tmp_path, isolation=INLINE)
    run(config)
    Manifest(config.paths.outputs, "test").start(["x"], 2)
    for number in (1, 2):
        run(replace(config, resume="none"), number=number)
    assert [name.partition("/")[0] for name in ran(config)] == ["references", "runs", "references", "runs", "runs"]


def test_a_failed_scoring_is_a_failed_row_of_a_done_run(tmp_path, clock) -> None:
    config = have_reference(run_config(tmp_path, isolation=INLINE))
    first = run(config, number=1)
    files = [folder_of(config).path / name for name in ("status.json", "config.yaml", "result.json")]
    stored = [file.read_text() for file in files]
    other = replace(config, metrics=MetricsConfig(names=("ssim",)), sweep=SweepConfig(name="later"))
    run(other, number=1, score="tests.sweep.fake_experiment:score_unscorable")
    assert [file.read_text() for file in files] == stored
    (row,) = rows_of_sweep(config.paths.outputs, "later")
    assert (row["status"], row["message"]) == ("failed", "no statistics to compare with")
    (row,) = rows_of_sweep(config.paths.outputs, "test")
    assert row["status"] == "done" and row["metrics"] == first.metrics
    assert run(other, number=None).status == "done"  # alone, and well: the failure is of the past
    assert rows_of_sweep(config.paths.outputs, "later")[0]["status"] == "done"


def test_scoring_again_keeps_the_group_of_the_first_sweep(tmp_path, monkeypatch) -> None:
    groups = []
    track_by(lambda folder, config, name, settings: groups.append(name), monkeypatch)
    config = run_config(tmp_path, tracking=TrackingConfig(mode="offline"), isolation=INLINE)
    have_reference(config)
    run(config, number=1)
    for number, metric in ((1, "ssim"), (2, "cosine"), (None, "relative_l2")):
        other = replace(config, metrics=MetricsConfig(names=(metric,)), sweep=SweepConfig(name="later"))
        run(other, number=number)
    assert groups == ["test"] * 4


def test_scoring_that_fails_costs_neither_the_run_nor_the_old_result(tmp_path) -> None:
    config = have_reference(run_config(tmp_path))
    first = run(config)
    other = replace(config, metrics=MetricsConfig(names=("ssim",)))
    row = run(other, score="tests.sweep.fake_experiment:score_unscorable")
    assert (row.status, row.reason, row.message) == ("failed", "load", "no statistics to compare with")
    assert folder_of(config).read_status().status == "done"
    assert folder_of(config).read_result()["metrics"] == first.metrics
    row = run(other)
    assert row.status == "done" and "quality/ssim" in row.metrics
    assert ran(config) == [f"runs/{first.key}"]


def test_scoring_again_uses_the_reference_that_was_used_before(tmp_path, monkeypatch) -> None:
    config = run_config(tmp_path)
    first = run(config)
    monkeypatch.setattr(reference, "reference_key", lambda config: "f" * 16)  # as after an upgrade of torch
    run(replace(config, metrics=MetricsConfig(names=("ssim",))))
    assert len(ran(config)) == 2
    assert folder_of(config).read_result()["reference"] == reference_key(config)
    assert first.status == "done"


def test_a_failed_reference_is_the_experiment_s_failure_and_tried_once_a_sweep(tmp_path, clock) -> None:
    config = run_config(tmp_path, 3, seed=fake_experiment.BAD_REFERENCE, isolation=INLINE)
    Manifest(config.paths.outputs, "test").start(["x"], 2)
    for number, one in enumerate((config, skipping(config, "a")), 1):
        row = run(one, number=number)
        assert (row.status, row.reason) == ("failed", "config")
        assert "reference" in row.message and "backend.x=1 must be 2" in row.message
        assert folder_of(one).read_status().reason == "config"
    assert ran(config) == [f"references/{reference_key(config)}"]
    run(config)  # alone, it is tried again
    assert len(ran(config)) == 2


def test_inline_runs_in_this_process(tmp_path) -> None:
    config = run_config(tmp_path, isolation=INLINE)
    assert run(config).status == "done"
    assert folder_of(config).read_status().pid == os.getpid()


def test_ctrl_c_goes_through_inline_too(tmp_path) -> None:
    config = have_reference(run_config(tmp_path, 21, isolation=INLINE))
    with pytest.raises(KeyboardInterrupt):
        run(config, number=1)
    assert folder_of(config).read_status().reason == "signal"
    assert Manifest(config.paths.outputs, "test").read()["jobs"][0]["reason"] == "signal"


def test_a_status_of_an_earlier_worker_is_not_taken_for_that_of_one_that_could_not_start(tmp_path, monkeypatch) -> None:
    config = have_reference(run_config(tmp_path, isolation=IsolationConfig(start="spawn")))
    run(config)
    monkeypatch.setattr(worker_process.sys, "executable", "/bin/false")
    row = run(replace(config, metrics=MetricsConfig(names=("ssim",))))
    assert (row.status, row.reason) == ("failed", "exit") and "code 1" in row.message


@pytest.mark.parametrize("file", ["config.yaml", "status.json", "jobs.jsonl", ".lock"])
def test_a_full_disk_is_a_failed_row_and_leaves_nothing_half_written(file, tmp_path, monkeypatch, capfd) -> None:
    config = have_reference(run_config(tmp_path, isolation=INLINE))
    real_replace, real_open = os.replace, os.open

    def full(real, path):
        def call(*arguments, **options):
            if Path(arguments[-1] if real is real_replace else arguments[0]).name == path:
                raise OSError(28, os.strerror(28))
            return real(*arguments, **options)

        return call

    monkeypatch.setattr(files.os, "replace", full(real_replace, file))
    monkeypatch.setattr(files.os, "open", full(real_open, file))
    row = run(config, number=1)
    monkeypatch.undo()
    output = "".join(capfd.readouterr())
    assert "No space left on device" in output and file in output and "Traceback" not in output
    if file == "jobs.jsonl":
        assert row.status == "done"
    else:
        assert (row.status, row.reason) == ("failed", "disk")
        assert "paths.outputs" in row.message
    assert not [path for path in (tmp_path / "outputs").rglob("*.tmp")]


def test_a_damaged_manifest_costs_the_record_and_not_the_run(tmp_path, capfd) -> None:
    config = have_reference(run_config(tmp_path, isolation=INLINE))
    files.write_text(Manifest(config.paths.outputs, "test").path, "{")
    assert run(config, number=1).status == "done"
    assert "missing in the sweep's manifest" in capfd.readouterr().err


def test_defects_of_the_program_itself_do_not_stop_a_sweep(tmp_path, monkeypatch, capfd) -> None:
    config = run_config(tmp_path)
    monkeypatch.setattr(job, "run_key", lambda config: 1 / 0)
    row = run(config, number=1)
    assert (row.status, row.reason) == ("failed", "error") and "ZeroDivisionError" in row.message
    assert "Traceback" in capfd.readouterr().err


def test_a_missing_checkpoint_fails_before_a_folder_is_made(tmp_path) -> None:
    config = run_config(tmp_path)
    (tmp_path / "checkpoint" / "model.safetensors").unlink()
    row = run(config)
    assert (row.status, row.reason, row.key) == ("failed", "load", "")
    assert not (tmp_path / "outputs").exists()


def test_a_configuration_that_does_not_resolve_is_recorded(tmp_path, capfd) -> None:
    row = refuse_job(ConfigError("x=1 is wrong"), ["x=1"], outputs=str(tmp_path), sweep_name="s", number=2)
    assert (row.status, row.reason, row.number) == ("failed", "config", 2)
    assert Manifest(tmp_path, "s").read()["jobs"][0]["message"] == "x=1 is wrong"
    assert "[2] x=1: failed (config): x=1 is wrong" in capfd.readouterr().out
    Manifest(tmp_path, "s").start([], 3, varying=["x"])
    refuse_job(ConfigError("wrong"), ["x=1"], outputs=str(tmp_path), sweep_name="s", number=2, label="digits · none")
    assert "[2/3] digits · none · x=1: failed (config): wrong" in capfd.readouterr().out


def test_every_line_and_the_tracker_name_what_varies_in_the_sweep(tmp_path, monkeypatch, capfd) -> None:
    settings = []
    track_by(lambda *arguments: settings.append(arguments[-1]), monkeypatch)
    config = run_config(tmp_path, tracking=TrackingConfig(mode="offline"), isolation=INLINE)
    Manifest(config.paths.outputs, "test").start([], 2, varying=["backend", "seed", "task.num_images"])
    run_job(config, ["backend=bitsandbytes", "seed=0", "task.num_images=1", "device=cpu"], number=1, **FAKES)
    assert settings == ["seed=0, num_images=1"]
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("[1/2]")]
    assert len(lines) == 3  # begins, its reference, ends
    assert all(
        line.startswith("[1/2] digits checkpoint · bitsandbytes · none · generate · seed=0, num_images=1: ")
        for line in lines
    )


def test_tracking_comes_after_the_result_and_cannot_lose_it(tmp_path, monkeypatch, capfd) -> None:
    calls = []

    def log_run(folder: Path, config: RunConfig, sweep_name: str | None, settings: str) -> None:
        calls.append((RunFolder(folder).read_status().status, sweep_name))
        raise RuntimeError("no network")

    track_by(log_run, monkeypatch)
    config = run_config(tmp_path, tracking=TrackingConfig(mode="offline"), isolation=INLINE)
    have_reference(config)
    row = run(config, number=1)
    assert row.status == "done" and calls == [("done", "test")]
    assert "warning" in (error := capfd.readouterr().err) and "no network" in error
    run(have_reference(replace(config, task=run_config(tmp_path, 2).task)))
    assert calls[1:] == [("failed", None)]
    run(replace(config, tracking=TrackingConfig(mode="none"), resume="none"))
    assert len(calls) == 2


def test_a_reused_run_is_tracked_if_it_was_not_before(tmp_path, monkeypatch) -> None:
    calls = []

    def log_run(folder: Path, config: RunConfig, sweep_name: str | None, settings: str) -> None:
        calls.append(config.tracking.mode)
        (folder / "wandb" / {"offline": "offline-run-1", "online": "run-1"}[config.tracking.mode]).mkdir(parents=True)

    track_by(log_run, monkeypatch)
    config = have_reference(run_config(tmp_path, isolation=INLINE))
    for mode in ("none", "offline", "offline", "online", "online", "none"):
        run(replace(config, tracking=TrackingConfig(mode=mode)))
    assert calls == ["offline", "online"]
    assert len(ran(config)) == 1


PARENT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has what it runs in the background ignore it
from dataclasses import replace
from pathlib import Path
from qexp.config.schema import SweepConfig
from qexp.sweep.job import run_job
from tests.sweep.settings import run_config
from tests.sweep.test_job import FAKES
config = run_config(Path(sys.argv[1]), int(sys.argv[2]), sweep=SweepConfig(name=sys.argv[3]))
row = run_job(replace(config, seed=int(sys.argv[4])), [], number=1, **FAKES)
print("row", row.status, row.reused)
"""


def parent(tmp_path: Path, behaviour: int, sweep: str, seed: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PARENT, str(tmp_path), str(behaviour), sweep, str(seed)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_a_worker_that_the_kernel_kills_for_memory_is_out_of_memory(tmp_path, monkeypatch) -> None:
    counts = iter([3, 4])  # before and after it
    monkeypatch.setattr(worker_process, "count_oom_kills", lambda: next(counts))
    config = have_reference(run_config(tmp_path, 13))
    row = run(config)
    assert (row.status, row.reason) == ("failed", "oom")
    assert "out-of-memory killer" in row.message and "worker.log" in row.message


def test_two_parents_run_the_same_experiment_once(tmp_path) -> None:
    config = have_reference(run_config(tmp_path, 20))
    first = parent(tmp_path, 20, "a")
    wait_for((folder_of(config).path / "started").exists)
    second = parent(tmp_path, 20, "b")
    assert second.stdout is not None and "being run by another process" in second.stdout.readline()
    Path(config.paths.outputs, "go").touch()
    assert "row done False" in first.communicate(timeout=300)[0]
    assert "row done True" in second.communicate(timeout=300)[0]
    assert ran(config) == [f"runs/{run_key(config)}"]


def test_a_worker_dies_with_its_killed_parent_and_counts_as_failed(tmp_path) -> None:
    config = have_reference(run_config(tmp_path, 16))
    folder = folder_of(config)
    one = parent(tmp_path, 16, "a")
    wait_for((folder.path / "started").exists)
    worker = folder.read_status().pid
    assert worker != one.pid and is_running(worker)
    one.kill()
    one.communicate()
    wait_for(lambda: not is_running(worker))
    assert folder.read_status().status == "failed"


def test_ctrl_c_kills_the_worker_marks_the_run_and_goes_through(tmp_path) -> None:
    config = have_reference(run_config(tmp_path, 16))
    folder = folder_of(config)
    one = parent(tmp_path, 16, "a")
    wait_for((folder.path / "started").exists)
    worker = folder.read_status().pid
    one.send_signal(signal.SIGINT)
    output = one.communicate(timeout=300)[0]
    assert "KeyboardInterrupt" in output and "\nrow " not in output  # to be turned into exit code 130 by the caller
    assert not is_running(worker)
    status = folder.read_status()
    assert (status.status, status.reason) == ("failed", "signal") and "Ctrl-C" in status.message
    (recorded,) = Manifest(config.paths.outputs, "a").read()["jobs"]
    assert (recorded["status"], recorded["reason"], recorded["key"]) == ("failed", "signal", run_key(config))


def test_ctrl_c_while_the_reference_runs_marks_both(tmp_path) -> None:
    config = run_config(tmp_path, 16, seed=fake_experiment.BAD_REFERENCE)
    one = parent(tmp_path, 16, "a", config.seed)
    wait_for((reference_of(config).path / "started").exists)
    one.send_signal(signal.SIGINT)
    one.communicate(timeout=300)
    for folder in (reference_of(config), folder_of(config)):
        status = folder.read_status()
        assert (status.status, status.reason) == ("failed", "signal") and "Ctrl-C" in status.message


def test_a_finished_run_runs_again_to_save_its_model_and_its_reference_saves_none(tmp_path) -> None:
    config = have_reference(run_config(tmp_path))
    assert run(config).status == "done"
    saving = replace(config, save=SaveConfig(path=str(tmp_path / "saved")))
    assert run_key(saving) == run_key(config)
    assert reference_config(saving).save.path is None
    assert not run(saving).reused
    model = tmp_path / "saved" / "config.json"
    model.parent.mkdir(exist_ok=True)
    model.write_text("{}")
    assert run(saving).reused  # a version that noted no files has saved it
    note_saved(folder_of(config).path, model.parent, [model])
    assert run(saving).reused
    os.utime(model, ns=(1, 1))
    assert not run(saving).reused
    note_saved(folder_of(config).path, model.parent, [model])
    in_layout = replace(config, save=replace(saving.save, layout="file"))
    assert not run(in_layout).reused  # the folder has another file
    note_saved(folder_of(config).path, model.parent, [model])
    assert run(in_layout).reused


def test_a_configuration_from_before_there_was_saving_reads(tmp_path) -> None:
    container = run_config(tmp_path).to_container()
    del container["save"]
    assert run_config_from_container(container) == run_config(tmp_path)


def test_a_place_that_cannot_be_saved_to_costs_no_result(tmp_path) -> None:
    place = "/proc/model"
    config = have_reference(run_config(tmp_path))
    assert run(config).status == "done"
    folder = folder_of(config)
    before = {path.name: path.read_bytes() for path in folder.path.iterdir() if path.is_file()}
    row = run(replace(config, save=SaveConfig(path=place)))
    assert (row.status, row.reason) == ("failed", "disk")
    assert place in row.message and row.message.endswith("or choose another folder with save.path=")
    assert {path.name: path.read_bytes() for path in folder.path.iterdir() if path.is_file()} == before
    assert run(config).reused


@pytest.mark.parametrize(("seed", "planned", "expected"), [(3, False, 0), (5, False, 0), (3, True, 1), (6, False, 1)])
def test_only_what_ran_is_a_run_on_wandb(seed: int, planned: bool, expected: int, tmp_path, monkeypatch) -> None:
    """Refused settings and files (3, 5) are none, unless a plan says that loading began; out of memory (6) is one."""
    logged = []
    track_by(lambda *arguments: logged.append(arguments), monkeypatch)
    config = have_reference(run_config(tmp_path, seed, tracking=TrackingConfig("offline"), isolation=INLINE))
    if planned:
        monkeypatch.setattr(RunFolder, "holds", lambda self, *names: True)
    assert run(config).status == "failed"
    assert len(logged) == expected
