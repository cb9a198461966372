import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qexp.errors import ConfigError, DiskError
from qexp.results.manifest import JobRow, Manifest, count_line
from qexp.results.run_folder import start_ticks

ROOT = Path(__file__).parents[2]
ADD = """
import sys; from qexp.results.manifest import JobRow, Manifest
for number in range(int(sys.argv[2]), int(sys.argv[2]) + 10):
    Manifest(sys.argv[1], "s").add(JobRow(number, "k", ("a=1",), "label", "done"))
"""


def job(status: str, reused: bool = False) -> dict[str, object]:
    return {"status": status, "reused": reused}


def test_jobs_in_several_processes_all_end_up_in_it_in_order(tmp_path) -> None:
    Manifest(tmp_path, "s").start(["python"], 30)
    writers = [
        subprocess.Popen([sys.executable, "-c", ADD, str(tmp_path), str(first)], cwd=ROOT) for first in (21, 1, 11)
    ]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert [one["number"] for one in Manifest(tmp_path, "s").read()["jobs"]] == list(range(1, 31))


def test_its_contents(tmp_path) -> None:
    manifest = Manifest(tmp_path, "s")
    assert manifest.read() is None
    manifest.start(["python", "-m", "qexp"], 2, notes="why", varying=["seed"])
    manifest.add(JobRow(1, "k", ("a=1", "b=2"), "label", "failed", "oom", "too big", False, 1.5, {"x/y": 1.0}))
    manifest.finish()
    values = manifest.read()
    assert values["started"] <= values["jobs"][0].pop("recorded")
    assert values["started"] <= values.pop("finished") and values.pop("started")
    assert re.fullmatch("[0-9a-f]{32}", values.pop("token"))
    job = {"number": 1, "key": "k", "label": "label", "overrides": ["a=1", "b=2"], "status": "failed", "reason": "oom"}
    job |= {"message": "too big", "reused": False, "seconds": 1.5, "kept": None}
    sweep = {"name": "s", "command": ["python", "-m", "qexp"], "notes": "why", "varying": ["seed"], "total": 2}
    assert values == {**sweep, "pid": os.getpid(), "ticks": start_ticks(os.getpid()), "jobs": [job]}


def test_a_job_that_is_recorded_twice_counts_once(tmp_path) -> None:
    manifest = Manifest(tmp_path, "s")
    manifest.start([], 1)
    manifest.add(JobRow(1, "k", (), "label", "failed"))
    manifest.add(JobRow(1, "k", (), "label", "done"))
    assert [one["status"] for one in manifest.read()["jobs"]] == ["done"]


def test_a_name_in_use_by_a_running_sweep_is_refused_until_it_ends(tmp_path) -> None:
    start = "import sys; from qexp.results.manifest import Manifest; Manifest(sys.argv[1], 's').start([], 1)"
    other = subprocess.Popen(
        [sys.executable, "-c", f"{start}; print('on', flush=True); input()", str(tmp_path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert other.stdout is not None and other.stdout.readline() == b"on\n"
    with pytest.raises(ConfigError, match=rf"sweep\.name=s .*{other.pid}"):
        Manifest(tmp_path, "s").start([], 1)
    other.kill()
    other.communicate()
    Manifest(tmp_path, "s").start([], 1)


def test_an_unwritable_folder_is_a_disk_error(tmp_path) -> None:
    (tmp_path / "sweeps").write_text("")
    with pytest.raises(DiskError, match=r"paths\.outputs"):
        Manifest(tmp_path, "s").start([], 1)


def test_the_last_line_counts_everything() -> None:
    jobs = [job("done")] * 7 + [job("done", True)] * 3 + [job("unsupported"), job("failed")]
    assert count_line(jobs) == "12 experiments: 10 done (3 reused), 1 unsupported, 1 failed"
    assert count_line([job("done")]) == "1 experiment: 1 done"
    assert count_line([job("skipped", True), job("failed")]) == "2 experiments: 0 done, 1 skipped, 1 failed"
    assert count_line([job("done")], total=3) == "3 experiments: 1 done, 2 not run, or cut off"
    assert count_line([job("damaged")]) == "1 experiment: 0 done, 1 damaged"
