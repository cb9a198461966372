import json
import subprocess
import sys
from pathlib import Path

import pytest

from qexp.cli.dry_run import earlier_runs, estimate_seconds
from qexp.config.schema import IsolationConfig
from qexp.sweep.job import run_job
from tests.composing import CommandLine
from tests.composing import command as command
from tests.sweep.fake_experiment import FAKES
from tests.sweep.settings import run_config

ROOT = Path(__file__).parents[2]


def dry_run(tmp_path: Path, *arguments: str) -> tuple[int, list[str]]:
    command = [sys.executable, "-m", "qexp", f"paths.outputs={tmp_path / 'outputs'}", "sweep.dry_run=true", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert not done.stderr, done.stderr
    return done.returncode, done.stdout.splitlines()


def test_dry_run_of_a_sweep_says_bytes_and_mistakes_and_writes_nothing(
    command: CommandLine, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code = command("sweep.dry_run=true", "-m", "backend=none,gguf_q4_0", "skip_modules=[],[proj_uot]")
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert code == 1 and not list(tmp_path.iterdir()) and not printed.err
    assert lines[0].endswith("would run, weights 9.5 MiB, its reference first, time unknown")
    assert "cannot run: skip_modules of 'transformer': the pattern 'proj_uot' matches no module" in lines[1]
    assert "weights 2.7 MiB" in lines[2]
    names = [line.partition(": ")[0] for line in lines[:4]]
    assert names[0] == "[1] digits · none · none · generate · skip_modules=[]"
    assert names[3] == "[4] digits · gguf Q4_0 · none · generate · skip_modules=[proj_uot]"
    assert lines[4] == "4 experiments: 2 would run, 2 cannot run; time unknown. Nothing was run."


@pytest.mark.exhaustive
def test_dry_run_of_one_experiment_says_that_it_would_be_reused(tmp_path) -> None:
    run = [sys.executable, "-m", "qexp", f"paths.outputs={tmp_path / 'outputs'}", "backend=none", "tracking=none"]
    small = ["task.num_images=1", "task.num_inference_steps=2"]
    subprocess.run([*run, *small], cwd=ROOT, capture_output=True, check=True, timeout=300)
    (folder,) = (tmp_path / "outputs/runs").iterdir()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    code, lines = dry_run(tmp_path, "backend=none", *small)
    assert code == 0 and f"would be reused from {folder.name}" in lines[0]
    code, lines = dry_run(tmp_path, "backend=gguf_q4_0", *small)
    assert code == 0 and "reference" not in lines[0]  # it is there
    seconds = json.loads((folder / "status.json").read_text())["seconds"]
    assert f"about {seconds:.1f} s (median of 1 with other backends)" in lines[0]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_times_are_those_of_the_nearest_runs(tmp_path) -> None:
    config = run_config(tmp_path, isolation=IsolationConfig(mode="inline"))
    assert estimate_seconds(config) is None
    earlier_runs.cache_clear()
    row = run_job(config, [], **FAKES)
    status = tmp_path / "outputs/runs" / row.key / "status.json"
    status.write_text(json.dumps(json.loads(status.read_text()) | {"seconds": 12.5}))
    assert estimate_seconds(config) == (12.5, "median of 1 run with this backend")
