"""The benchmark of sweeps: it measures both ways to start workers, and says which targets were missed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bench_sweep import TARGETS, misses

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_sweep.py"


def found(
    ratio: float = 9.0, gap: float = 0.2, single: float = 8.0, beyond: float = 5.0, grown: float = 1.0
) -> dict[str, Any]:
    return {
        "single": {"wall_seconds": single},
        "sweeps": [{"experiments": count, "wall_ratio": ratio, "gap_seconds": {"median": gap}} for count in (12, 48)],
        "pass_over": {"beyond_seconds": beyond, "mib_after_a_tenth": 90.0, "mib_after_all": 90.0 + grown},
    }


def test_every_target_is_checked() -> None:
    assert misses(found()) == []
    assert misses(found(ratio=4.0)) == ["ratio_48 is 4.00, below 5.0"]
    missed = misses(found(ratio=1.0, gap=0.6, single=10.0, beyond=30.0, grown=100.0))
    assert [line.partition(" ")[0] for line in missed] == list(TARGETS)


@pytest.mark.exhaustive
def test_both_ways_to_start_workers_are_measured(tmp_path: Path) -> None:
    out = tmp_path / "sweep.json"
    command = [sys.executable, str(SCRIPT), "--quick", "--folder", str(tmp_path), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    (row,) = result["sweeps"]
    for start in ("fork", "spawn"):
        assert row[start]["wall_seconds"] > 0 and row[start]["cpu_seconds"] > 0
    assert row["cpu_ratio"] == row["spawn"]["cpu_seconds"] / row["fork"]["cpu_seconds"] > 1
    assert row["gap_seconds"]["n"] == 1 and 0 < row["gap_seconds"]["median"] < row["fork"]["wall_seconds"]
    passed = result["pass_over"]
    assert passed["compose_seconds"] + passed["beyond_seconds"] == pytest.approx(passed["wall_seconds"])
    assert passed["compose_seconds"] > 0 and 20 < passed["mib_after_all"] < 1000
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.json"]  # nothing is left
