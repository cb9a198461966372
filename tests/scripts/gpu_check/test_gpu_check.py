"""The whole command, as tried without a GPU: on a CPU, on the fake accelerator, and with faults put in."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.scripts.gpu_check import faults

ROOT = Path(__file__).parents[3]
FAKE = ("--small", "--device", "fake", "--setup")
PEER_LIMIT = "incompatible tensor type"  # the fake device's tensors cannot be assigned to `param.data` on the host


def gpu_check(*arguments: str, out: Path | None = None) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    command = [str(ROOT / "scripts" / "gpu_check"), *arguments, *(["--out", str(out)] if out else [])]
    environment = os.environ | {"PYTHON": sys.executable, "TORCHDYNAMO_DISABLE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)
    return done, json.loads(out.read_text()) if out and out.exists() else {}


def rows(result: dict[str, Any], group: str) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in result["rows"] if row["group"] == group}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done, result = gpu_check(out=tmp_path / "out.json")
    assert done.returncode == 3 and "no NVIDIA GPU" in done.stderr and result == {}


@pytest.mark.exhaustive
def test_on_a_cpu_everything_passes(tmp_path: Path) -> None:
    options = ("--small", "--device", "cpu", "--backends", "quanto_int4", "--folder", str(tmp_path))
    done, result = gpu_check(*options, out=tmp_path / "out.json")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "PASSED" in done.stdout and result["passed"] is True
    assert result["counts"] == {"passed": len(result["rows"]) - 2, "unsupported": 2}  # the targets
    assert result["device"] == {"device": "cpu", "dtype": "bfloat16"}
    assert result["versions"]["torch"] == torch.__version__ and result["date"] and result["host"]
    assert set(result["git"]) == {"commit", "dirty"}
    # none; three places × model, sequential, and leaf and block without streams
    assert len(rows(result, "offload")) == 1 + 3 * 4 and len(rows(result, "loading")) == 5
    peers = [line["mode"] for line in result["speed"]["modes"] if line["mode"].startswith("diffusers")]
    assert peers == ["diffusers leaf no stream", "diffusers block no stream"]
    assert all(line["equal"] for line in result["speed"]["modes"])
    assert list(tmp_path.iterdir()) == [tmp_path / "out.json"]


@pytest.mark.exhaustive
def test_on_the_fake_accelerator_all_but_the_peer_passes(tmp_path: Path) -> None:
    options = (*FAKE, "tests.fake_device.backend:install", "--backends", "torchao")
    done, result = gpu_check(*options, out=tmp_path / "out.json")
    assert done.returncode == 1
    failed = [row for row in result["rows"] if row["status"] == "failed"]
    assert len(failed) == 6 and all("diffusers" in row["name"] and PEER_LIMIT in row["message"] for row in failed)
    offload = rows(result, "offload")
    assert len(offload) == 1 + 3 * (2 + 2 * 4)
    for name, row in offload.items():
        found, moves = row["numbers"], not any(part in name for part in ("none", "model"))
        assert row["status"] == "passed" and found["equal_forwards"] == 3
        assert found["h2d_bytes"] == (found["payload_bytes"] if moves else 0)
        assert found["peak_device_bytes"] >= found["ring_bytes"] + found["outside_groups_bytes"]
        assert (found["payload_bytes"] > 0.9 * found["weights_bytes"]) == ("none" not in name)
        waits = "low_cpu_mem" in name or "disk" in name
        assert found["host_waits"] == 0 or waits
    assert all(
        row["numbers"]["peak_device_bytes"] > 0 for name, row in rows(result, "loading").items() if "mem" in name
    )


@pytest.mark.exhaustive
def test_faults_are_rows_and_the_rest_is_checked(tmp_path: Path) -> None:
    options = (*FAKE, "tests.scripts.gpu_check.faults:install", "--backends", "none", "--groups", "speed", "offload")
    done, result = gpu_check(*options, out=tmp_path / "out.json")
    assert done.returncode == 1 and "FAILED" in done.stdout and result["passed"] is False
    found = rows(result, "offload")
    assert len(found) == 1 + 3 * (2 + 2 * 4)
    failed = {name.split(" · ")[1]: row["message"] for name, row in found.items() if row["status"] != "passed"}
    assert set(failed) == {faults.RAISES, faults.DIES, faults.LEAVES}
    assert "RuntimeError: broken on purpose" in failed[faults.RAISES]
    assert "the process died with status 9" in failed[faults.DIES]
    assert "at rest" in failed[faults.LEAVES] and "bytes are on the device" in failed[faults.LEAVES]
    died = rows(result, "speed")[f"round 1 · {faults.DIES_TIMED}"]
    assert died["status"] == "failed" and "status 9" in died["message"]
    timed = {line["mode"]: line for line in result["speed"]["modes"]}  # of the second process, without what died
    assert {"resident", "qexp block stream"} <= set(timed) and faults.DIES_TIMED not in timed
    assert all(line["equal"] for line in timed.values())
