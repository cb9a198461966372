import json
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.products import exhaustive
from tests.waiting import wait_for

ROOT = Path(__file__).parents[2]


REAL = ["-m", "qexp", "-m", "backend=none", "offload=leaf", "offload.to=disk", "task.num_images=1",
        "task.num_inference_steps=100000", "reference.offload=leaf"]  # fmt: skip
WITHOUT_TORCH = """
from functools import partial
import qexp.sweep.job
from qexp.__main__ import main
from tests.sweep.fake_experiment import FAKES

qexp.sweep.job.run_job = partial(qexp.sweep.job.run_job, **FAKES)
main()
"""
SLEEPING = ["-c", WITHOUT_TORCH, "-m", "backend=packed_uint4", "task.num_images=15"]  # with a child and scratch files


@pytest.mark.parametrize(
    ("name", "program"), [("SIGTERM", SLEEPING), exhaustive("SIGTERM", REAL), exhaustive("SIGHUP", REAL)],
    ids=["SIGTERM", "SIGTERM-real", "SIGHUP-real"],
)  # fmt: skip
def test_ending_signal_marks_the_experiment_removes_its_files_and_prints_the_table(name, program, tmp_path) -> None:
    command = [sys.executable, *program, "seed=0,1", "tracking=none", f"paths.outputs={tmp_path}"]
    sweep = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # nohup around the tests has it ignored
    )
    try:
        wait_for(lambda: list(tmp_path.glob("*/*/offload/*")))
        family = psutil.Process(sweep.pid).children(recursive=True)
        sweep.send_signal(signal.Signals[name])
        output = sweep.communicate(timeout=100)[0]
    finally:
        sweep.terminate()
    assert sweep.returncode == 128 + signal.Signals[name]
    assert "2 experiments: 0 done, 1 failed, 1 not run, or cut off" in output and "#1 digits" in output
    assert "Traceback" not in output
    (status,) = (json.loads(path.read_text()) for path in tmp_path.glob("runs/*/status.json"))
    assert (status["status"], status["reason"]) == ("failed", "signal") and f"stopped by {name}" in status["message"]
    assert not list(tmp_path.glob("*/*/offload")) and not list(tmp_path.glob("*/*/.*.tmp"))
    assert not [process for process in family if process.is_running() and process.status() != "zombie"]
