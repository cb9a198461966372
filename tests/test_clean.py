import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qexp.clean import clean, find_leftovers
from qexp.config.schema import IsolationConfig
from qexp.errors import DiskError
from qexp.results.run_folder import RunFolder
from qexp.sweep.job import run_job
from tests.sweep.fake_experiment import FAKES
from tests.sweep.settings import run_config

ROOT = Path(__file__).parents[1]


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    """A finished run with its reference, a failed one, one without a status, and what killed processes left."""
    inline = IsolationConfig(mode="inline")
    done = run_job(run_config(tmp_path, 1, isolation=inline), [], **FAKES)
    failed = run_job(run_config(tmp_path, 2, isolation=inline), [], **FAKES)
    outputs = tmp_path / "outputs"
    used = RunFolder(outputs / "runs" / done.key).read_result()["reference"]
    for reference in (outputs / "references").iterdir():  # that of the failed run has other settings
        if reference.name != used:
            shutil.rmtree(reference)
    (outputs / "runs" / done.key).rename(outputs / "runs" / "done")
    (outputs / "runs" / failed.key).rename(outputs / "runs" / "failed")
    (outputs / "runs" / "begun").mkdir()
    (outputs / "runs" / "done" / "offload").mkdir()
    (outputs / "runs" / "done" / "offload" / "weights").write_bytes(b"x" * 3 * 2**20)
    (outputs / "runs" / "done" / ".save-1").mkdir()
    (outputs / "runs" / "failed" / ".outputs.safetensors.1.tmp").write_bytes(b"half")
    return outputs


def found(outputs: Path, *kinds: str) -> set[str]:
    return {str(leftover.path.relative_to(outputs)) for leftover in find_leftovers(outputs, kinds)}


def test_what_failed_and_was_left_over_is_found_once(outputs) -> None:
    assert found(outputs, "failed") == {"runs/failed", "runs/begun"}
    both = {"runs/failed", "runs/begun", "runs/done/offload", "runs/done/.save-1"}
    assert found(outputs, "failed", "scratch") == both
    assert found(outputs, "references", "sweeps") == set()


def test_references_and_sweeps_that_nothing_uses_are_found(outputs) -> None:
    (reference,) = (outputs / "references").iterdir()
    (outputs / "sweeps" / "old").mkdir(parents=True)
    job = {"number": 1, "key": "gone", "status": "done"}
    values = {"name": "old", "started": "2026", "finished": "2026", "pid": None, "total": 1, "jobs": [job]}
    (outputs / "sweeps/old/manifest.json").write_text(json.dumps(values))
    assert found(outputs, "references", "sweeps") == {"sweeps/old"}
    (outputs / "runs/done/result.json").unlink()
    assert found(outputs, "references") == {f"references/{reference.name}"}


def test_finished_runs_stay_and_so_does_what_a_process_holds(outputs, capsys) -> None:
    before = sorted(path.name for path in (outputs / "runs/done").iterdir() if not path.name.startswith("."))
    with RunFolder(outputs / "runs/begun").locked(print):
        assert clean(outputs, ["failed", "scratch"], is_agreed=True) == 0
    assert {path.name for path in (outputs / "runs").iterdir()} == {"done", "begun"}
    before.remove("offload")
    assert sorted(path.name for path in (outputs / "runs/done").iterdir() if path.name[0] != ".") == before
    output = capsys.readouterr().out
    assert "3.0 MiB" in output and "runs/failed  failed (error)" in output and "removed 3" in output


def test_nothing_is_removed_without_an_answer(outputs) -> None:
    command = [sys.executable, "-m", "qexp.clean", "--outputs", str(outputs)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 1 and "add --yes" in done.stdout
    assert (outputs / "runs/failed").exists() and (outputs / "runs/done/offload").exists()
    wrong = subprocess.run([*command, "everything"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 1 and "'everything' is not a kind; use failed, quantized, references" in wrong.stderr


def test_result_whose_status_is_lost_or_unreadable_stays(outputs, monkeypatch) -> None:
    (outputs / "runs/done/status.json").unlink()
    assert found(outputs, "failed") == {"runs/failed", "runs/begun"}

    def unreadable(folder: RunFolder) -> None:
        raise DiskError(f"{folder.path}: cannot be read")

    monkeypatch.setattr(RunFolder, "read_status", unreadable)
    with pytest.raises(DiskError, match="cannot be read"):
        found(outputs, "failed")


def test_weights_that_sweeps_keep_are_removed_on_request(outputs) -> None:
    entry = outputs / "quantized" / "0123456789abcdef"
    entry.mkdir(parents=True)
    (entry / "weights.safetensors").write_bytes(b"x" * 2**20)
    assert found(outputs, "failed", "scratch", "references", "sweeps") & {"quantized"} == set()
    assert found(outputs, "quantized") == {"quantized"}
    assert clean(outputs, ["quantized"], True) == 0
    assert not (outputs / "quantized").exists() and (outputs / "runs/done/result.json").exists()
