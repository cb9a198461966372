"""Peak memory of loading, seen from outside the process: quantized bytes + largest dense tensor + 128 MiB at most."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_load.py"
HALF_GIB = ("--shapes", "flux", "--layers", "0", "2", "--repeats", "1", "--cases", "warm", "--no-command")


def bench(folder: Path, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    command = [sys.executable, str(SCRIPT), "--folder", str(folder), "--out", str(folder / "load.json"), *arguments]
    process = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert (folder / "load.json").exists(), process.stderr
    return process.returncode, json.loads((folder / "load.json").read_text())["rows"]


@pytest.mark.exhaustive
def test_loading_stays_within_its_bound(tmp_path: Path) -> None:
    formats = ("nf4", "torchao int8wo", "quanto_int4")
    code, rows = bench(tmp_path, *HALF_GIB, "--programs", "qexp", "--formats", *formats)
    assert code == 0
    assert [row["format"] for row in rows] == list(formats)
    for run in (row["qexp"]["memory"] for row in rows):
        assert run["peak_total_bytes"] <= run["quantized_bytes"] + run["largest_dense_bytes"] + (128 << 20)
        assert run["peak_total_bytes"] >= run["quantized_bytes"]  # or the sampler saw nothing
        assert run["peak_file_bytes"] < 16 << 20  # files are read, not mapped


@pytest.mark.exhaustive
def test_a_kernel_of_the_library_on_whole_tensors_would_not(tmp_path: Path) -> None:
    code, rows = bench(
        tmp_path, *HALF_GIB, "--programs", "qexp", "--formats", "quanto_int4", "--slice-weights", str(1 << 40)
    )
    run = rows[0]["qexp"]["memory"]
    assert code != 0
    assert run["peak_total_bytes"] > run["quantized_bytes"] + run["largest_dense_bytes"] + (128 << 20)


@pytest.mark.exhaustive
def test_both_programs_and_the_limits_are_measured(tmp_path: Path) -> None:
    small = ("--heads", "2", "--quick", "--shards", "2", "--cases", "shards-cold", "--no-command")
    code, rows = bench(tmp_path, *small, "--shapes", "flux", "t5", "--formats", "nf4", "nf4, stored")
    assert code == 0
    assert [row["shape"] for row in rows] == ["flux"] * 2 + ["t5"] * 2
    for row in rows:
        for run in (row["qexp"], row["diffusers"]):
            assert 0 < run["wall_seconds"] < run["touched_seconds"] and run["import_seconds"] > 0
        assert row["limits"]["pipeline_seconds"] > 0
    assert rows[0]["limits"]["kernel_cpu_seconds"] > 0
    assert rows[0]["qexp"]["memory"]["quantized_bytes"] == rows[1]["qexp"]["memory"]["quantized_bytes"]
