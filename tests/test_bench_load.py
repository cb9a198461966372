"""Peak memory of loading, seen from outside the process: quantized bytes + largest dense tensor + 128 MiB at most."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench_load.py"


def bench(folder: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    command = [sys.executable, str(SCRIPT), "--gib", "0.375", "--folder", str(folder), *arguments]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert process.stdout, process.stderr
    return process.returncode, json.loads(process.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["bitsandbytes", "torchao", "quanto_int4"])
def test_loading_stays_within_its_bound(backend: str, tmp_path: Path) -> None:
    code, result = bench(tmp_path, "--backend", backend)
    assert code == 0
    assert result["peak_total_bytes"] <= result["quantized_bytes"] + result["largest_dense_bytes"] + (128 << 20)
    assert result["peak_total_bytes"] >= result["quantized_bytes"]  # or the sampler saw nothing
    assert result["peak_file_bytes"] < 16 << 20  # files are read, not mapped


@pytest.mark.slow
def test_a_library_call_on_whole_tensors_would_not(tmp_path: Path) -> None:
    code, result = bench(tmp_path, "--slice-weights", str(1 << 40))
    assert code != 0
    assert result["peak_total_bytes"] > result["bound_bytes"]
