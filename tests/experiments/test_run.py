"""Experiments end to end, in this process, on a digits model with random weights: files, numbers, and offloading."""

import csv
import json
import shutil
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file

from qexp.config.schema import RunConfig
from qexp.errors import ConfigError, LoadError
from qexp.experiments.reference import reference_config
from qexp.experiments.run import _slow_dtypes as slow_dtypes
from qexp.experiments.run import run_experiment
from qexp.loading.gguf_saving import save_gguf
from qexp.metrics.registry import find_metric
from qexp.models.digits import Source
from qexp.sweep.run_key import reference_key, run_key
from tests import assigning
from tests.backends import BACKENDS, save_digits
from tests.products import exhaustive, representatives

Resident = Callable[[str], tuple[dict[str, Any], dict[str, torch.Tensor], Path]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_digits(tmp_path_factory.mktemp("digits"), depth=2)


def run_config(checkpoint: Path, *overrides: str, task: str = "generate") -> RunConfig:
    small = ("task.num_images=3", "task.num_inference_steps=2") if task == "generate" else ()
    return assigning.run_config(f"task={task}", *small, f"model.path={checkpoint}", "device=cpu", *overrides)


def run(checkpoint: Path, folder: Path, *overrides: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    folder.mkdir(parents=True, exist_ok=True)
    metrics = run_experiment(run_config(checkpoint, *overrides), folder)
    assert [name for name in metrics if find_metric(name) is None] == []
    return metrics, load_file(folder / "outputs.safetensors")


@pytest.fixture(scope="module")
def default_run(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Metrics and outputs of the defaults: nf4, resident."""
    return run(checkpoint, tmp_path_factory.mktemp("default"))


@pytest.fixture(scope="module")
def resident(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Resident:
    """Metrics, outputs and the folder of a resident run with a backend, which is made once and saves its model."""

    @cache
    def run_once(backend: str) -> tuple[dict[str, Any], dict[str, torch.Tensor], Path]:
        folder: Path = tmp_path_factory.mktemp(backend)
        return *run(checkpoint, folder, f"backend={backend}", f"save.path={folder / 'saved'}"), folder

    return run_once


def test_activations_are_calibrated_before_the_model_is_saved_and_offloaded(
    checkpoint: Path, resident: Resident, tmp_path: Path
) -> None:
    chosen = ("backend=quanto", "backend.activations_dtype=int8", "backend.calibration_samples=5")
    saved = tmp_path / "q"
    _, expected = run(checkpoint, tmp_path / "one", *chosen, f"save.path={saved}")
    _, weights_alone, _ = resident("quanto")
    assert not torch.equal(expected["images"], weights_alone["images"])
    metrics, offloaded = run(checkpoint, tmp_path / "three", *chosen, "offload=block", "offload.to=disk")
    assert metrics["offload/groups"] >= 2
    _, reopened = run(saved, tmp_path / "four", "backend=none")
    for outputs in (offloaded, reopened):
        assert torch.equal(outputs["trajectory"], expected["trajectory"])


@pytest.mark.parametrize(
    ("capability", "overrides", "said"),
    [
        ("AVX2", (), "without which bfloat16 is several times slower than compute_dtype=fp32"),
        exhaustive("AVX2", ("compute_dtype=fp16",), "without which float16 is"),
        ("AVX2", ("compute_dtype=fp32",), None),
        ("AVX512", (), None),
    ],
)
def test_a_dtype_that_the_cpu_has_no_instructions_for_is_named(
    capability: str,
    overrides: tuple[str, ...],
    said: str | None,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    run(checkpoint, tmp_path, "backend=quanto", *overrides)
    printed = capsys.readouterr().err
    assert said in printed if said else "AVX" not in printed


def test_a_gpu_needs_no_instructions_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    planned = cast(Any, [SimpleNamespace(prepared=SimpleNamespace(compute_dtype=torch.bfloat16))])
    assert slow_dtypes(planned, torch.device("cuda")) is None
    assert "AVX-512" in str(slow_dtypes(planned, torch.device("cpu")))


@pytest.mark.parametrize(
    ("overrides", "is_said"),
    [(("compute_dtype=fp32",), True), (("compute_dtype=fp32", "reference.dtype=fp32"), False), ((), False)],
)
def test_a_reference_in_another_dtype_is_named(
    overrides: tuple[str, ...], is_said: bool, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(checkpoint, tmp_path, "backend=quanto", *overrides)
    said = "computes in float32, its reference in bfloat16, as the checkpoint is stored"
    assert (said in capsys.readouterr().err) == is_said


def test_the_reference_of_a_stored_model_is_another_checkpoint_whatever_its_dtype(
    checkpoint: Path, resident: Resident, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, folder = resident("quanto")
    capsys.readouterr()
    run(folder / "saved", tmp_path / "b", "compute_dtype=fp32", f"model.reference_path={checkpoint}")
    assert "its reference in" not in capsys.readouterr().err


def test_calibration_samples_have_noise_of_their_own(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate, seeds = Source.generate, []

    def noted(source: Source, *arguments: Any, seed: int, **options: Any) -> dict[str, torch.Tensor]:
        seeds.append(seed)
        return generate(source, *arguments, seed=seed, **options)

    monkeypatch.setattr(Source, "generate", noted)
    run(checkpoint, tmp_path, "backend=quanto", "backend.activations_dtype=int8", "seed=5")
    calibration, measurement = seeds
    assert measurement == 5 and calibration != 5


def test_calibration_is_part_of_the_key_where_it_counts(checkpoint: Path) -> None:
    def key(*overrides: str) -> str:
        return run_key(run_config(checkpoint, "backend=quanto", *overrides))

    assert key("backend.calibration_samples=5") == key()
    assert key("backend.activations_dtype=int8") != key()
    few, many = (key("backend.activations_dtype=int8", f"backend.calibration_samples={n}") for n in (5, 6))
    assert few != many


@pytest.mark.parametrize(
    ("backend", "strategy", "to"),
    representatives(
        product(BACKENDS, ("leaf", "block"), ("disk", "cpu")),
        [("quanto_int4", "leaf", "disk"), ("quanto_int4", "block", "cpu")],
    ),
)
def test_offloading_changes_no_bit_and_proves_that_it_happened(
    backend: str, strategy: str, to: str, checkpoint: Path, resident: Resident, tmp_path: Path
) -> None:
    before, expected, _ = resident(backend)
    assert before["offload/groups"] == before["offload/transferred_gib"] == 0
    assert (before["load/quantized_modules"] > 0) == (backend != "none")
    overrides = (f"backend={backend}", f"offload={strategy}", f"offload.to={to}")
    metrics, outputs = run(checkpoint, tmp_path, *overrides)
    assert all(torch.equal(outputs[name], expected[name]) for name in expected)
    assert metrics["offload/groups"] >= 2
    payload, groups = metrics["offload/payload_gib"], metrics["offload/groups"]
    ahead = 1 if to == "disk" else 0  # two steps, and from disk what was read for a third
    assert 2 * payload * 0.999 <= metrics["offload/transferred_gib"] <= (2 + ahead) * payload * 1.001
    assert 2 * groups <= metrics["offload/copies"] <= (2 + ahead) * groups
    at_rest = 0 if to == "disk" else metrics["offload/payload_gib"]  # on a CPU, its memory is the device's
    assert metrics["offload/at_rest_device_gib"] == at_rest
    assert metrics["offload/payload_gib"] > 0.6 * metrics["memory/weights_gib"]


@pytest.mark.parametrize(
    "overrides",
    [("device_map={*:cpu,blocks.1:disk,x_embed:disk}",), ("device_map=auto", "max_memory={cpu:800KB,disk:1GB}")],
    ids=["by_module", "planned"],
)
def test_a_device_map_changes_no_bit_and_says_where_the_weights_are(
    overrides: tuple[str, ...],
    default_run: tuple[dict[str, Any], dict[str, torch.Tensor]],
    checkpoint: Path,
    tmp_path: Path,
) -> None:
    resident, expected = default_run
    metrics, outputs = run(checkpoint, tmp_path / "placed", *overrides)
    assert all(torch.equal(outputs[name], expected[name]) for name in expected)
    places = [metrics["memory/weights_cpu_gib"], metrics["memory/weights_disk_gib"]]
    assert min(places) > 0 and sum(places) == pytest.approx(resident["memory/weights_gib"], rel=0.02)
    assert metrics["memory/weights_gib"] == resident["memory/weights_gib"]
    (placement,) = [plan["placement"] for plan in json.loads((tmp_path / "placed" / "plan.json").read_text()).values()]
    assert placement["bytes"].keys() == {"cpu", "disk"}
    assert {"cpu"} == set(placement["computed_on"].values())
    assert not (tmp_path / "placed" / "offload").exists() or not any((tmp_path / "placed" / "offload").rglob("*.part"))
    config = run_config(checkpoint, *overrides)
    assert reference_config(config).device_map == "auto" and reference_config(config).max_memory == config.max_memory
    assert reference_key(config) == reference_key(run_config(checkpoint))
    assert run_key(config) != run_key(run_config(checkpoint))


def test_generate_writes_its_files(resident: Resident) -> None:
    metrics, outputs, folder = resident("torchao")
    assert outputs["images"].shape == (3, 1, 8, 8)
    assert outputs["trajectory"].shape == (2, 3, 1, 8, 8)
    rows = list(csv.DictReader((folder / "memory.csv").open()))
    assert [row["step"] for row in rows] == ["1", "2"]
    loading = [float(row["host_gib"]) for row in csv.DictReader((folder / "load_memory.csv").open())]
    baseline, peak = metrics["load/baseline_host_gib"], metrics["load/peak_host_gib"]
    assert baseline is not None and peak is not None
    assert baseline - 0.01 < min(loading) <= max(loading) < baseline + peak + 0.01  # GiB
    plan = json.loads((folder / "plan.json").read_text())["transformer"]
    assert len(plan["quantized"]) == metrics["load/quantized_modules"]
    assert set(plan["skipped"]) == {"x_embed", "proj_out"}
    assert plan["unused"] == []
    assert plan["result_bytes"] / 2**30 == pytest.approx(metrics["memory/weights_gib"])


def test_numbers_agree_with_each_other(resident: Resident) -> None:
    """5.2 M parameters of 16 bits; int8 with a scale and a zero point a row of 256 or 1,024 weights."""
    none, _, _ = resident("none")
    assert none["memory/weights_gib"] == none["memory/dense_weights_gib"]
    assert none["memory/model_bits_per_weight"] == pytest.approx(16)
    assert "memory/bits_per_weight" not in none
    int8, _, _ = resident("torchao")
    assert 8 + 40 / 1024 < int8["memory/bits_per_weight"] < 8 + 40 / 256
    assert 0.5 < int8["memory/weights_gib"] / int8["memory/dense_weights_gib"] < 0.53
    assert int8["load/peak_host_gib"] >= 0
    assert 0 < int8["time/step_ms"] < 1000 * int8["time/total_seconds"]


def test_roundtrip_writes_layers(checkpoint: Path, tmp_path: Path) -> None:
    metrics = run_experiment(run_config(checkpoint, task="roundtrip"), tmp_path)
    assert [name for name in metrics if find_metric(name) is None] == []
    rows = list(csv.DictReader((tmp_path / "layers.csv").open()))
    assert len(rows) == metrics["roundtrip/layers"] == metrics["load/quantized_modules"]
    assert metrics["roundtrip/sqnr_db_min"] == min(float(row["sqnr_db"]) for row in rows)
    assert 20 < metrics["roundtrip/sqnr_db_mean"] < 22  # nf4 on nearly uniform initial weights
    assert not (tmp_path / "outputs.safetensors").exists()


def test_a_setting_that_skips_everything_is_an_error(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"quantized no layer.*loosen skip_modules"):
        run(checkpoint, tmp_path, "backend=quanto", "skip_modules=['**']")


def damaged(checkpoint: Path, folder: Path, name: str, value: float) -> Path:
    """A copy of the checkpoint with one value of one tensor replaced."""
    shutil.copytree(checkpoint, folder)
    tensors = load_file(checkpoint / "model.safetensors")
    tensors[name].view(-1)[3] = value
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("task", ["generate", "roundtrip"])
@pytest.mark.parametrize(
    ("backend", "name"), [("none", "blocks.0.attn.to_q.weight"), ("torchao", "blocks.0.mlp.fc1.bias")]
)
def test_a_value_that_is_not_finite_is_an_error_in_any_tensor(
    task: str, backend: str, name: str, checkpoint: Path, tmp_path: Path
) -> None:
    if task == "roundtrip" and name.endswith("bias"):
        pytest.skip("round trips read weights alone")
    bad = damaged(checkpoint, tmp_path / "bad", name, float("inf"))
    with pytest.raises(LoadError, match=f"'{name}' is not finite in bfloat16"):
        run_experiment(run_config(bad, f"backend={backend}", task=task), tmp_path)


@pytest.mark.parametrize(
    "pattern",
    representatives(
        ["**.attn", "proj_out", "x_embed", "y_embed", "t_embed", "blocks.0", "blocks.*.mlp.fc1"],
        ("blocks.*.mlp.fc1",),
    ),
)
def test_modules_kept_in_fp32_compute_in_fp32(pattern: str, checkpoint: Path, tmp_path: Path) -> None:
    _, kept = run(checkpoint, tmp_path / "b", "backend=none", f'keep_in_fp32_modules=["{pattern}"]')
    _, exact = run(checkpoint, tmp_path / "c", "backend=none", "compute_dtype=fp32")
    assert (kept["images"] - exact["images"]).abs().max() < 0.1
    fields = ("backend=bitsandbytes", f'keep_in_fp32_modules=["{pattern}"]')
    quantized, offloaded = (run(checkpoint, tmp_path / one, *fields, f"offload={one}") for one in ("none", "leaf"))
    assert torch.equal(quantized[1]["images"], offloaded[1]["images"])


def test_a_checkpoint_in_fp64_is_computed_in_fp32(checkpoint: Path, tmp_path: Path) -> None:
    tensors = {name: tensor.double() for name, tensor in load_file(checkpoint / "model.safetensors").items()}
    shutil.copytree(checkpoint, tmp_path / "fp64")
    save_file(tensors, tmp_path / "fp64" / "model.safetensors")
    metrics, _ = run(tmp_path / "fp64", tmp_path / "run", "backend=bitsandbytes")
    assert metrics["load/quantized_modules"] > 0


@pytest.mark.parametrize(
    ("backend", "offload"),
    [
        exhaustive("bitsandbytes", "none"),
        ("bitsandbytes_int8", "leaf"),
        exhaustive("torchao", "none"),
        ("quanto_int4", "leaf"),
        exhaustive("bitsandbytes", "leaf"),
        exhaustive("bitsandbytes_int8", "none"),
        exhaustive("torchao", "leaf"),
        exhaustive("quanto_int4", "none"),
    ],
)
def test_what_was_saved_answers_the_same_without_any_setting(
    backend: str, offload: str, checkpoint: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "saved"
    first, expected = run(
        checkpoint, tmp_path / "a", f"backend={backend}", f"save.path={saved}", "save.max_shard_gib=0.001"
    )
    assert len(list(saved.glob("*.safetensors"))) > 1
    config = run_config(saved, f"offload={offload}")  # backend is the default, nf4: the checkpoint wins
    assert config.components["transformer"].backend.quant_method == backend.partition("_")[0]
    second, outputs = run(saved, tmp_path / "b", f"offload={offload}")
    assert torch.equal(outputs["images"], expected["images"])
    assert second["memory/weights_gib"] == first["memory/weights_gib"]
    assert second["memory/bits_per_weight"] == first["memory/bits_per_weight"]
    assert second["load/unused_tensors"] == 0


def test_the_reference_of_a_quantized_checkpoint_is_the_unquantized_one(
    checkpoint: Path, resident: Resident, tmp_path: Path
) -> None:
    saved = resident("torchao")[2] / "saved"
    reference = reference_config(run_config(saved, f"model.reference_path={checkpoint}"))
    assert reference.model.path == str(checkpoint)
    assert reference.components["transformer"].backend.quant_method == "none"
    assert reference_key(run_config(saved, f"model.reference_path={checkpoint}")) == reference_key(
        run_config(checkpoint)
    )
    with pytest.raises(ConfigError, match=r"is quantized already; set model\.reference_path to the checkpoint"):
        run_experiment(run_config(saved, task="roundtrip"), tmp_path)


@pytest.mark.parametrize(
    "backend",
    representatives(
        ["bitsandbytes_nf4_dq", "bitsandbytes_int8", "torchao", "quanto_int4", "packed_fp6_e3w2", "gguf"],
        ("quanto_int4", "gguf"),
    ),
)
def test_a_roundtrip_of_a_quantized_checkpoint_is_that_of_its_original(
    backend: str, checkpoint: Path, tmp_path: Path
) -> None:
    """Of a checkpoint in shards that part weights from their scales, its original given: the same numbers."""
    saved, skip = tmp_path / "saved", ("skip_modules=[x_embed,proj_out]",)
    run(checkpoint, tmp_path / "a", f"backend={backend}", *skip, f"save.path={saved}", "save.max_shard_gib=0.0005")
    folders = [tmp_path / name for name in ("fresh", "stored")]
    for folder in folders:
        folder.mkdir()
    fresh = run_experiment(run_config(checkpoint, f"backend={backend}", *skip, task="roundtrip"), folders[0])
    config = run_config(saved, f"model.reference_path={checkpoint}", task="roundtrip")
    stored = run_experiment(config, folders[1])
    tables = [sorted(csv.reader((folder / "layers.csv").open())) for folder in folders]
    assert tables[0] == tables[1] and len(tables[0]) > 5
    numbers = ("roundtrip/sqnr_db_mean", "roundtrip/max_abs_error", "memory/bits_per_weight", "load/quantized_modules")
    for name in numbers:
        assert stored[name] == pytest.approx(fresh[name]), name
    with pytest.raises(ConfigError, match="is quantized itself"):
        run_experiment(run_config(saved, f"model.reference_path={saved}", task="roundtrip"), tmp_path)


def test_an_original_of_another_shape(checkpoint: Path, resident: Resident, tmp_path: Path) -> None:
    saved, other = resident("torchao")[2] / "saved", tmp_path / "other"
    shutil.copytree(checkpoint, other)
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["blocks.0.attn.to_q.weight"] = tensors["blocks.0.attn.to_q.weight"][:, :8].contiguous()
    save_file(tensors, other / "model.safetensors")
    config = run_config(saved, f"model.reference_path={other}", task="roundtrip")
    with pytest.raises(
        LoadError, match=r"reference_path: .* has BF16 \[\d+, 8\] where 'blocks\.0\.attn\.to_q\.weight'"
    ):
        run_experiment(config, tmp_path)
    assert run_key(config) != run_key(run_config(saved, f"model.reference_path={checkpoint}", task="roundtrip"))


@pytest.mark.parametrize(
    ("backend", "offload"),
    [
        ("gguf_q4_0", "leaf"),
        exhaustive("gguf backend.compute_dtype=fp32", "none"),
        exhaustive("gguf", "none"),
        exhaustive("gguf", "leaf"),
        exhaustive("gguf_q4_0", "none"),
        exhaustive("gguf backend.compute_dtype=fp32", "leaf"),
    ],
)
def test_a_saved_gguf_file_answers_the_same_without_any_setting(
    backend: str, offload: str, checkpoint: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "saved"
    first, expected = run(checkpoint, tmp_path / "a", *f"backend={backend} save.path={saved}".split())
    assert sorted(file.name for file in saved.iterdir()) == ["config.json", "model.gguf"]
    alone = tmp_path / "alone.gguf"
    shutil.copy(saved / "model.gguf", alone)
    for number, place in enumerate((saved, saved / "model.gguf", alone)):
        config = run_config(place, f"offload={offload}").components["transformer"].backend
        assert (config.quant_method, config.label) == ("gguf", "Q4_0" if "q4" in backend else "Q8_0")
        second, outputs = run(place, tmp_path / str(number), f"offload={offload}")
        assert torch.equal(outputs["images"], expected["images"])
        for name in ("memory/weights_gib", "memory/bits_per_weight"):
            assert second[name] == first[name], name
        assert second["load/unused_tensors"] == 0
    assert run_key(run_config(saved)) == run_key(run_config(saved / "model.gguf", "backend=gguf"))
    reference = reference_config(run_config(alone, f"model.reference_path={checkpoint}"))
    assert (reference.model.path, reference.components["transformer"].backend.quant_method) == (str(checkpoint), "none")


def test_a_gguf_file_without_a_config_is_refused_with_its_remedy(checkpoint: Path, tmp_path: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    save_gguf(tmp_path / "bare.gguf", tensors, architecture="x")
    with pytest.raises(LoadError, match=r"has no config\.json.*put it beside the file"):
        run(tmp_path / "bare.gguf", tmp_path / "run", "backend=none")
