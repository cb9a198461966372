"""The benchmark of offloading to disk: it measures every program, and what it says of qexp holds."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_offload.py"


def bench(folder: Path, *arguments: str) -> tuple[int, str, list[dict[str, Any]]]:
    command = [sys.executable, str(SCRIPT), "--quick", "--folder", str(folder), "--out", str(folder / "offload.json")]
    process = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=900)
    assert (folder / "offload.json").exists(), process.stderr
    return process.returncode, process.stdout, json.loads((folder / "offload.json").read_text())["rows"]


@pytest.mark.exhaustive
def test_every_program_is_measured_beside_the_disk(tmp_path: Path) -> None:
    code, shown, (row,) = bench(tmp_path, "--formats", "dense", "--tokens", "1", "8")
    assert code == 0
    for program in ("resident", "qexp leaf", "qexp block", "diffusers leaf", "diffusers block", "accelerate"):
        assert all(row[program][f"{cache}_{count}_seconds"] > 0 for cache in ("cold", "warm") for count in (1, 8))
        assert row[program]["outputs"] == row["resident"]["outputs"]
        assert f"  {program}" in shown
    # of a model so small, the others' may be less than a process's noise
    assert row["resident"]["peak_total_bytes"] > 0
    assert row["qexp leaf"]["peak_file_bytes"] < 1 << 20  # neither mapped nor left behind
    # reading what the limit reads takes as long at least, whatever computes
    nbytes = row["qexp leaf"]["offload/payload_gib"] * 2**30
    best = max(row["disk"]["direct_bytes_per_second"], row["disk"]["buffered_bytes_per_second"])
    assert row["limits"]["cold_1_seconds"] >= nbytes / best
    assert row["limits"]["warm_8_seconds"] >= row["resident"]["warm_8_seconds"]


@pytest.mark.exhaustive
def test_what_a_program_refuses_is_recorded(tmp_path: Path) -> None:
    programs = ("resident", "qexp leaf", "diffusers leaf")
    code, shown, (row,) = bench(tmp_path, "--formats", "torchao int8wo", "--tokens", "1", "--programs", *programs)
    assert code == 0
    assert row["qexp leaf"]["outputs"] == row["resident"]["outputs"]
    assert "ValueError" in row["diffusers leaf"]["refused"]
    assert "diffusers leaf   refused: ValueError" in shown
