"""The benchmark of shared machines: it measures every case, and says which targets were missed."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from bench_shared import BUSY_PROGRAMS, busy_program, describe, kind_of_threads, misses, variables_of

from tests.waiting import wait_for

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_shared.py"


def row(threads: str, beside: str, step_ms: float, times_quiet: float = 1.0) -> dict[str, Any]:
    spread = {"step_ms": step_ms, "least_step_ms": step_ms, "largest_step_ms": step_ms, "slowest_step_ms": step_ms}
    case = {"backend": "none", "threads": threads, "beside": beside}
    return {**case, "n": 5, **spread, "other_cores": 0.25, "times_quiet": times_quiet}


def test_every_target_is_checked() -> None:
    quiet = [row("qexp", "nothing", 45.8), row("spinning", "nothing", 45.0)]
    beside = [row("qexp", "counting", 130, 2.9), row("spinning", "counting", 4500, 100)]
    assert misses([*quiet, *beside]) == []
    assert misses([row("qexp", "nothing", 46.0), quiet[1]]) == [
        "none: 46.0 ms a step as workers start, 45.0 spinning: more than 2% lost"
    ]
    (missed,) = misses([*quiet, row("qexp", "multiplying", 140, 3.1)])
    assert missed.startswith("none: beside a program that is multiplying, a step takes 3.10 times its quiet time")
    assert misses([row("qexp", "nothing", 46.0)]) == []  # nothing to compare with


def test_table_has_a_row_for_each_case() -> None:
    head, line, first = describe([row("qexp", "nothing", 45.0)]).splitlines()
    assert head.count("|") == line.count("|") == first.count("|")
    assert first == "| none | qexp | nothing | 45.0 (45.0, 45.0) | 5 | 45 | 0.25 | 1.00 |"


@pytest.mark.parametrize("name", ["counting", pytest.param("multiplying", marks=pytest.mark.exhaustive)])
def test_a_busy_program_computes_until_the_block_ends(name: str) -> None:
    with busy_program(name):
        (child,) = [one for one in psutil.Process().children() if "busy" in "".join(one.cmdline())]
        before = sum(child.cpu_times()[:2])
        while sum(child.cpu_times()[:2]) < before + 0.2:
            assert child.is_running()
    assert not child.is_running()


def test_a_busy_program_ends_with_a_benchmark_that_is_killed() -> None:
    code = """
import os, bench_shared, psutil
with bench_shared.busy_program("counting"):
    print(psutil.Process().children()[0].pid, flush=True)
    os._exit(1)
"""
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    wait_for(lambda: has_ended(int(done.stdout)))


def has_ended(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def test_number_of_turns_is_a_kind_of_threads() -> None:
    assert variables_of(kind_of_threads("30000")) == {"GOMP_SPINCOUNT": "30000"}
    assert variables_of(kind_of_threads("qexp")) == {}
    with pytest.raises(argparse.ArgumentTypeError, match=r"sleepy: use qexp, .* turns"):
        kind_of_threads("sleepy")


@pytest.mark.exhaustive
def test_every_case_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "shared.json"
    command = [sys.executable, str(SCRIPT), "--quick", "--backends", "bitsandbytes", "--folder", str(tmp_path)]
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert result["machine"]["instruction_sets"] and result["machine"]["load_average_before"] >= 0
    rows = {(one["threads"], one["beside"]): one for one in result["rows"]}
    assert set(rows) == {(kind, beside) for kind in ("qexp", "spinning") for beside in ("nothing", *BUSY_PROGRAMS)}
    for (kind, _), one in rows.items():
        assert one["n"] == 1 and 0 < one["step_ms"] == one["least_step_ms"] <= one["slowest_step_ms"]
        assert one["times_quiet"] == one["step_ms"] / rows[kind, "nothing"]["step_ms"]
        assert f"| bitsandbytes | {kind} | {one['beside']} |" in done.stdout
        assert one["beside"] == "nothing" or one["other_cores"] > 0.2
    assert [path.name for path in tmp_path.iterdir()] == ["shared.json"]  # nothing is left
