"""Experiments end to end, in this process, on a digits model with random weights: files, numbers, and offloading."""

import csv
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file, save_file

from qexp.config import to_run_config
from qexp.experiment import run_experiment
from qexp.models.digits_network import DigitsConfig, DigitsTransformer
from qexp.options import conf_folder
from qexp.schema import register_schemas
from qexp.settings import RunConfig
from tests.backends import BACKENDS


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("digits")
    model = DigitsTransformer(DigitsConfig(depth=2)).bfloat16()
    save_file(dict(model.state_dict()), folder / "model.safetensors")
    (folder / "config.json").write_text(
        json.dumps({"_class_name": "DigitsTransformer", **asdict(DigitsConfig(depth=2))})
    )
    return folder


def run_config(checkpoint: Path, *overrides: str, task: str = "generate") -> RunConfig:
    register_schemas()
    small = ("task.num_images=3", "task.num_inference_steps=2") if task == "generate" else ()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return to_run_config(
            compose("config", [f"task={task}", *small, f"model.path={checkpoint}", "device=cpu", *overrides])
        )


def run(checkpoint: Path, folder: Path, *overrides: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    folder.mkdir(parents=True, exist_ok=True)
    metrics = run_experiment(run_config(checkpoint, *overrides), folder)
    return metrics, load_file(folder / "outputs.safetensors")


@pytest.mark.parametrize("backend", BACKENDS)
def test_offloading_changes_no_bit_and_proves_that_it_happened(backend: str, checkpoint: Path, tmp_path: Path) -> None:
    resident, expected = run(checkpoint, tmp_path / "none", f"backend={backend}", "offload=none")
    assert resident["offload/groups"] == resident["offload/transferred_gib"] == 0
    assert (resident["load/quantized_modules"] > 0) == (backend != "none")
    for strategy in ("leaf", "block"):
        for to in ("disk", "cpu"):
            overrides = (f"backend={backend}", f"offload={strategy}", f"offload.to={to}")
            metrics, outputs = run(checkpoint, tmp_path / strategy / to, *overrides)
            assert all(torch.equal(outputs[name], expected[name]) for name in expected), (strategy, to)
            assert metrics["offload/groups"] >= 2
            assert metrics["offload/transferred_gib"] == pytest.approx(2 * metrics["offload/payload_gib"])  # two steps
            assert metrics["offload/copies"] == 2 * metrics["offload/groups"]
            at_rest = 0 if to == "disk" else metrics["offload/payload_gib"]  # on a CPU, its memory is the device's
            assert metrics["offload/at_rest_device_gib"] == at_rest
            assert metrics["offload/payload_gib"] > 0.6 * metrics["memory/weights_gib"]


def test_generate_writes_its_files(checkpoint: Path, tmp_path: Path) -> None:
    metrics, outputs = run(checkpoint, tmp_path, "backend=torchao")
    assert outputs["images"].shape == (3, 1, 8, 8)
    assert outputs["trajectory"].shape == (2, 3, 1, 8, 8)
    rows = list(csv.DictReader((tmp_path / "memory.csv").open()))
    assert [row["step"] for row in rows] == ["1", "2"]
    plan = json.loads((tmp_path / "plan.json").read_text())["transformer"]
    assert len(plan["quantized"]) == metrics["load/quantized_modules"]
    assert set(plan["skipped"]) == {"x_embed", "proj_out"}
    assert plan["unused"] == []
    assert plan["result_bytes"] / 2**30 == pytest.approx(metrics["memory/weights_gib"])


def test_numbers_agree_with_each_other(checkpoint: Path, tmp_path: Path) -> None:
    """5.2 M parameters of 16 bits; int8 with a scale and a zero point a row of 256 or 1,024 weights."""
    none, _ = run(checkpoint, tmp_path / "a", "backend=none")
    assert none["memory/weights_gib"] == none["memory/dense_weights_gib"]
    assert none["memory/model_bits_per_weight"] == pytest.approx(16)
    assert "memory/bits_per_weight" not in none
    int8, _ = run(checkpoint, tmp_path / "b", "backend=torchao")
    assert 8 + 40 / 1024 < int8["memory/bits_per_weight"] < 8 + 40 / 256
    assert 0.5 < int8["memory/weights_gib"] / int8["memory/dense_weights_gib"] < 0.53
    assert int8["load/peak_host_gib"] >= 0
    assert 0 < int8["time/step_ms"] < 1000 * int8["time/total_seconds"]


def test_roundtrip_writes_layers(checkpoint: Path, tmp_path: Path) -> None:
    metrics = run_experiment(run_config(checkpoint, task="roundtrip"), tmp_path)
    rows = list(csv.DictReader((tmp_path / "layers.csv").open()))
    assert len(rows) == metrics["roundtrip/layers"] == metrics["load/quantized_modules"]
    assert metrics["roundtrip/sqnr_db_min"] == min(float(row["sqnr_db"]) for row in rows)
    assert 20 < metrics["roundtrip/sqnr_db_mean"] < 22  # nf4 on nearly uniform initial weights
    assert not (tmp_path / "outputs.safetensors").exists()


def test_a_setting_that_skips_everything_is_an_error(checkpoint: Path, tmp_path: Path) -> None:
    from qexp.errors import LoadError

    with pytest.raises(LoadError, match=r"quantized no layer.*loosen skip_modules"):
        run(checkpoint, tmp_path, "backend=quanto", "skip_modules=['**']")
