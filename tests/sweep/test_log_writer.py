import shutil
import signal
import threading
from dataclasses import replace
from pathlib import Path

from qexp.config.schema import IsolationConfig, TrackingConfig
from qexp.results.run_folder import RunFolder
from qexp.sweep.job import run_job
from qexp.sweep.log_writer import LogWriter
from tests.sweep.fake_experiment import FAKES
from tests.sweep.settings import run_config


def finished_run(tmp_path: Path):
    """A finished run that was not tracked: its configuration, now with tracking, and its folder."""
    config = run_config(tmp_path, isolation=IsolationConfig(mode="inline"))
    row = run_job(config, [], **FAKES)
    assert row.status == "done", row.message
    return replace(config, tracking=TrackingConfig(mode="offline")), tmp_path / "outputs" / "runs" / row.key


def test_runs_are_logged_in_order_once_their_folders_are_free_and_a_failure_is_a_warning(tmp_path, capfd) -> None:
    config, folder = finished_run(tmp_path)
    other, damaged = folder.with_name("other"), folder.with_name("damaged")
    for copied in (other, damaged):
        shutil.copytree(folder, copied)
    (damaged / "config.yaml").write_text("model: [", encoding="utf-8")
    writer = LogWriter()
    writer.log(damaged, config, None)
    with RunFolder(folder).locked(print):
        writer.log(folder, config, "a sweep")
        writer.log(other, config, "a sweep")
        assert not list(folder.glob("wandb/offline-run-*"))
    writer.close()
    assert all(list(each.glob("wandb/offline-run-*/*.wandb")) for each in (folder, other))
    printed = capfd.readouterr()
    assert f"warning: {damaged} is not tracked" in printed.err
    lines = [line for line in printed.out.splitlines() if line.startswith("W&B run: ")]
    assert [Path(line.split(": ")[1]).parts[-3] for line in lines] == [folder.name, "other"]


def test_writer_that_was_killed_is_a_warning(tmp_path, capfd) -> None:
    config, folder = finished_run(tmp_path)
    writer = LogWriter()
    process = writer.start()
    process.kill()
    process.wait()
    writer.log(folder, config, None)
    assert f"warning: {folder} is not tracked" in capfd.readouterr().err
    writer.close()


def test_sweep_does_not_wait_for_runs_that_are_still_to_be_logged(tmp_path) -> None:
    config, folder = finished_run(tmp_path)
    writer = LogWriter()
    process = writer.start()
    process.send_signal(signal.SIGSTOP)  # it reads nothing
    orders = [(folder.with_name(f"run{number}"), config, "a sweep") for number in range(100)]

    def log_all() -> None:
        for order in orders:
            writer.log(*order)

    thread = threading.Thread(target=log_all, daemon=True)
    thread.start()
    thread.join(20)
    is_waiting = thread.is_alive()
    process.kill()
    process.wait()
    assert not is_waiting
