"""What `to_run_config` resolves and refuses, and stored configurations."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from qexp.config.schema import SaveConfig
from qexp.errors import ConfigError, LoadError, QexpError, UnsupportedError
from qexp.experiments.resolve import to_run_config
from qexp.experiments.stored import absolute_path, run_config_from_container, with_absolute_paths
from qexp.models.base import load_source
from qexp.models.diffusers import DiffusersConfig
from qexp.sweep.run_key import run_key
from qexp.system import devices
from tests.assigning import assigned, run_config
from tests.language import save_language_model


@pytest.fixture(autouse=True)
def machine_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "cuda_device_count", lambda: 0)


def settings() -> dict[str, Any]:
    """The composed defaults as a plain mapping."""
    container = OmegaConf.to_container(assigned(), resolve=True)
    assert isinstance(container, dict)
    return {str(name): value for name, value in container.items()}


def message_of(*overrides: str) -> str:
    with pytest.raises(QexpError) as caught:
        run_config(*overrides)
    return str(caught.value)


def test_defaults_are_nf4_generate_resident_on_the_cpu() -> None:
    config = run_config()
    transformer = config.components["transformer"]
    assert (transformer.backend.quant_method, transformer.backend.bnb_4bit_quant_type) == ("bitsandbytes", "nf4")
    assert transformer.skip_modules == ("proj_out", "x_embed")
    assert (config.task.name, config.offload.strategy, config.device) == ("generate", "none", "cpu")


def test_paths_are_absolute_in_what_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever setting they are of; files behind @file are read."""
    save_language_model(tmp_path / "models/tiny")
    save_language_model(tmp_path / "models/original")
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "images" / name).touch()
    contents = {"text.txt": "543+870=", "prompts.txt": "1+1=\n2+2=\n", "skip.txt": "lm_head\n"}
    contents["recipe.yaml"] = "rules: [{backend: gguf_q4_0}]"
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    options = ["model=causal_lm", "model.path=models/tiny", "model.reference_path=models/../models/original"]
    options += ["task.text=text.txt", "task.prompt=@prompts.txt", "skip_modules=@skip.txt", "backend=mixed"]
    options += ["backend.recipe=@recipe.yaml", "metrics.fid_images=images", "save.path=saved"]
    config = with_absolute_paths(run_config(*options))
    (tmp_path / "elsewhere").mkdir()
    for name in ("prompts.txt", "skip.txt", "recipe.yaml"):
        (tmp_path / name).unlink()
    monkeypatch.chdir(tmp_path / "elsewhere")
    stored = json.loads(json.dumps(config.to_container()))
    assert stored["model"]["path"] == f"{tmp_path}/models/tiny"
    assert Path(stored["model"]["reference_path"]).samefile(tmp_path / "models/original")
    assert stored["task"]["text"] == f"{tmp_path}/text.txt" and stored["task"]["prompt"] == ["1+1=", "2+2="]
    assert stored["save"]["path"] == f"{tmp_path}/saved" and stored["metrics"]["fid_images"] == f"{tmp_path}/images"
    assert stored["metrics"]["clip_model"] == "openai/clip-vit-base-patch16"  # of a hub
    again = run_config_from_container(stored)
    assert again == config and run_key(again) == run_key(config)


def test_inputs_of_forward_and_a_users_module_are_found_from_anywhere(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/__init__.py").touch()
    (tmp_path / "mine/anywhere.py").write_text("from torch import nn\ndef build():\n    return nn.Linear(64, 64)\n")
    save_file({"weight": torch.ones(64, 64), "bias": torch.ones(64)}, tmp_path / "w.safetensors")
    save_file({"input": torch.ones(2, 64)}, tmp_path / "x.safetensors")
    monkeypatch.chdir(tmp_path)
    options = ["model=python", "model.factory=mine.anywhere:build", "model.checkpoint=w.safetensors", "task=forward"]
    config = with_absolute_paths(run_config(*options, "task.inputs=x.safetensors", "backend=torchao"))
    assert (config.model.folder, config.model.path) == (str(tmp_path), f"{tmp_path}/w.safetensors")
    assert config.task.inputs == f"{tmp_path}/x.safetensors"
    key = run_key(config)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = run_config_from_container(json.loads(json.dumps(config.to_container())))
    assert run_key(again) == key
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert load_source(again.model).skeleton("model", {}).in_features == 64


def test_every_file_of_a_pipeline_is_stored_by_an_absolute_path(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user/name").mkdir(parents=True)
    lora = ["style.safetensors", {"path": "loras/a", "weight": 0.5}]
    model = DiffusersConfig(path="user/name", checkpoints={"transformer": "files/t"}, lora=lora)
    config = replace(run_config(), model=model, save=SaveConfig(path="not/there"))
    found, save = with_absolute_paths(config).model, with_absolute_paths(config).save
    assert (found.path, found.checkpoints) == (f"{tmp_path}/user/name", {"transformer": f"{tmp_path}/files/t"})
    assert save.path == f"{tmp_path}/not/there"  # not the name of a repository
    assert found.lora == [f"{tmp_path}/style.safetensors", {"path": f"{tmp_path}/loras/a", "weight": 0.5}]
    assert DiffusersConfig(path="user/other", lora="a").with_paths(absolute_path).lora == f"{tmp_path}/a"
    of_hub = replace(config, model=DiffusersConfig(path="user/other"))
    assert with_absolute_paths(of_hub).model.path == "user/other"
    assert absolute_path("~/a") == str(Path.home() / "a")


TOP_LEVEL = {
    "seed=3": lambda config: config.seed == 3,
    "resume=stale": lambda config: config.resume == "stale",
    "device=cpu": lambda config: config.device == "cpu",
    "device_map=cpu": lambda config: config.device == "cpu",
    "compute_dtype=bf16": lambda config: config.components["transformer"].compute_dtype == "bfloat16",
    "compute_dtype=float16": lambda config: config.components["transformer"].compute_dtype == "float16",
    "reference.dtype=fp32": lambda config: config.reference.dtype == "float32",
    "backend.bnb_4bit_compute_dtype=fp16": lambda c: (
        c.components["transformer"].backend.bnb_4bit_compute_dtype == "float16"
    ),
    "keep_in_fp32_modules=[norm_out]": lambda c: c.components["transformer"].keep_in_fp32_modules == ("norm_out",),
    "skip_modules=[blocks.0.attn]": lambda c: (
        c.components["transformer"].skip_modules == ("blocks.0.attn", "proj_out", "x_embed")
    ),
    "model.skip_modules=[]": lambda config: config.components["transformer"].skip_modules == (),
    "paths.outputs=elsewhere": lambda config: config.paths.outputs == "elsewhere",
    "loader.workers=2": lambda config: config.loader.workers == 2,
    "loader.map=false": lambda config: config.loader.map is False,
    "offload=leaf": lambda config: (config.offload.strategy, config.offload.to) == ("leaf", "disk"),
    "isolation.timeout_minutes=5": lambda config: config.isolation.timeout_minutes == 5.0,
    "metrics.names=[ssim]": lambda config: config.metrics.names == ("ssim",),
}


@pytest.mark.parametrize("override", TOP_LEVEL)
def test_a_setting_arrives_where_it_is_used(override: str) -> None:
    assert not TOP_LEVEL[override](run_config()) or override == "device=cpu" or override == "device_map=cpu"
    assert TOP_LEVEL[override](run_config(override))


MESSAGES = {
    "resume=mising": "resume=mising is unknown (did you mean missing?); use failed, missing, none or stale",
    "tracking.mode=of": "tracking.mode=of is unknown",
    "isolation.mode=thread": "use inline or process",
    "isolation.timeout_minutes=0": "must be above 0, or null",
    "metrics.names=[psnr]": "did you mean psnr_db?",
    "offload.strategy=leafs": "offload.strategy='leafs' is unknown",
    "offload.to=gpu": "use auto, cpu or disk",
    "reference.offload=lef": "reference.offload=lef is unknown (did you mean leaf?)",
    "loader.in_flight_mib=0": "loader.in_flight_mib=0 must be 1 or more",
    "loader.workers=0": "or null for one per core",
    "loader.cache=": "loader.cache= is empty; give a folder",
    "loader.cache_gib=0": "loader.cache_gib=0.0 must be a number above 0, or null",
    "loader.map=null": "loader.map=None must be auto, true or false",
    "sweep.name=a/b": "must be a folder's name",
    "compute_dtype=fp31": "use bf16, bfloat16, float16, float32, fp16 or fp32",
    "reference.dtype=int8": "reference.dtype=int8 is not a compute dtype",
    "backend.bnb_4bit_compute_dtype=fp8": "backend.bnb_4bit_compute_dtype=fp8 is not a compute dtype",
    "backend.bnb_4bit_quant_type=nf5": "nf5",
    "device=gpu": "device=gpu is unknown (did you mean cuda?); use auto, cpu, cuda or cuda:<index>",
    "device_map=tpu": "device_map=tpu is unknown",
    "device_map=balancd": "device_map=balancd is unknown (did you mean balanced",
    "device_map={a:cpu,b:dsk}": "device_map[b]=dsk is unknown (did you mean disk?)",
    "max_memory={cpu:1GiB}": "none is set; set device_map, such as device_map=auto",
    "low_cpu_mem_usage=false": "there is only the streaming path",
    "skip_modules=proj_out": "must be a list, such as [proj_out], or @file",
    "skip_modules=@missing.txt": "skip_modules=@missing.txt cannot be read: No such file or directory",
    "skip_modules=[1]": "skip_modules[0]=1 must be a string",
    "+components.vae.compute_dtype=fp16": "components.vae is not a component of this model; use transformer",
    "+components.transformr.compute_dtype=fp16": "did you mean transformer?",
    "+components.transformer.dtype=fp16": "components.transformer.dtype is not a known field",
    "+components.transformer.compute_dtype=3": "components.transformer.compute_dtype=3 must be a string, or null",
    "+components.transformer=3": "components.transformer=3 must be a group of fields",
    "+sede=3": "sede is not a known field (did you mean seed or sweep?); valid here: backend, ",
    "++offload.too=disk": "offload.too is not a known field (did you mean to?)",
    "~backend": "backend=null chooses nothing; use bitsandbytes",
    "model.path=${nowhere}": "model.path does not resolve: Interpolation key 'nowhere' not found",
    "task.num_images=???": "task.num_images is missing",
    "task.num_images=0": "must be 1 or more",
}


@pytest.mark.parametrize("override", MESSAGES)
def test_a_wrong_setting_is_named_with_its_rule_and_remedy(override: str) -> None:
    message = message_of(override)
    assert MESSAGES[override] in message
    assert "\n" not in message


def test_inline_experiments_have_no_timeout() -> None:
    assert "needs a process to end" in message_of("isolation=inline", "isolation.timeout_minutes=1")


def test_devices_that_are_not_there_are_unsupported_and_not_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedError, match="device=cuda:1 needs CUDA device 1, and this machine"):
        run_config("device=cuda:1")
    monkeypatch.setattr(devices, "cuda_device_count", lambda: 2)
    assert run_config("device=cuda:1").device == "cuda:1"
    assert run_config().device == run_config("device=cuda").device == "cuda:0"
    with pytest.raises(UnsupportedError):
        run_config("device=cuda:2")


def test_device_maps_are_spelled_out_and_sizes_are_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "cuda_device_count", lambda: 2)
    config = to_run_config({**settings(), "device_map": {"a": 1, "b": "cuda", "": "disk"}})
    assert config.device == "cuda:1"
    assert config.device_map == {"a": "cuda:1", "b": "cuda:0", "": "disk"}
    assert to_run_config({**settings(), "device_map": {"a": 1, "*": "cpu"}}).device_map == {"a": "cuda:1", "": "cpu"}
    sizes = {0: "10GiB", "1": "500MB", "cpu": 7, "disk": "1.5 TB"}
    config = to_run_config({**settings(), "device_map": "balanced", "max_memory": sizes})
    assert (config.device, config.device_map) == ("cuda:0", "balanced")
    assert config.max_memory == {"cuda:0": 10 * 2**30, "cuda:1": 500 * 10**6, "cpu": 7, "disk": 15 * 10**11}
    assert run_config_from_container(config.to_container()) == config
    limited = to_run_config({**settings(), "device_map": "cpu", "max_memory": {"cpu": "1GiB"}})
    assert limited.device_map == {"": "cpu"}  # there is a limit to check


@pytest.mark.parametrize(
    ("size", "nbytes"),
    [("24GB", 24_000_000_000), ("24gib", 25_769_803_776), ("1.5 kB", 1500), ("3MiB", 3_145_728), ("80 B", 80)],
)
def test_units_of_sizes_are_decimal_without_an_i(size: str, nbytes: int) -> None:
    assert devices.parse_bytes(size, "cpu") == nbytes


def test_device_maps_and_what_they_conflict_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "cuda_device_count", lambda: 1)
    for given, message in {
        ("device_map=auto", "offload=leaf"): "where each module rests, and so does offload.strategy=leaf; use offload",
        ("device_map={a:0,b:cpu}", "offload=model"): "and so does offload.strategy=model",
        ("device_map=auto", "device=cuda:0"): "uses all accelerators, which contradicts device=cuda:0",
        ("device_map={a:0,b:cpu}", "device=cpu"): "and device=cpu disagree",
        ("device_map={a:1,b:cpu}",): "device_map[a]=cuda:1 needs CUDA device 1, and this machine has 1",
        ("device_map=auto", "max_memory={0:lots}"): "max_memory[0]=lots is not a size",
        ("device_map=auto", "max_memory={0:-1}"): "max_memory[0]=-1 is not a size",
        ("device_map=auto", "max_memory={gpu:1GiB}"): "max_memory[gpu]=gpu is unknown",
        ("device_map=auto", "max_memory=1GiB"): "must give a size for each device",
    }.items():
        assert message in message_of(*given), given
    assert to_run_config({**settings(), "device_map": 0, "offload": {"strategy": "leaf"}}).device_map is None


def test_a_task_that_goes_layer_by_layer_places_no_model() -> None:
    for given in (["device_map={blocks:cpu}"], ["device_map={blocks:disk,*:cpu}"]):
        assert "with task=roundtrip: it goes layer by layer" in message_of("task=roundtrip", *given), given
    assert message_of("task=roundtrip", "device_map=cpu", "max_memory={cpu:1}").startswith("max_memory with task=")
    assert run_config("task=roundtrip", "device_map=cpu").device_map is None
    assert run_config("task=roundtrip", "device_map=auto").device_map == "auto"


def test_a_reference_that_does_not_exist_is_named_by_its_own_setting(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    assert message_of(f"model.reference_path={missing}").startswith(f"model.reference_path={missing} does not exist")


def test_device_map_of_one_device_means_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "cuda_device_count", lambda: 2)
    assert to_run_config({**settings(), "device_map": {"": "cuda:1"}}).device == "cuda:1"
    assert to_run_config({**settings(), "device_map": {"": 1}}).device == "cuda:1"
    assert to_run_config({**settings(), "device_map": 0, "device": "cuda"}).device == "cuda:0"
    assert "device_map=cpu and device=cuda:1 disagree" in message_of("device_map=cpu", "device=cuda:1")


def test_offload_to_auto_is_memory_beside_a_gpu_and_disk_without(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_config("offload=block", "offload.num_blocks_per_group=2").offload.to == "disk"
    monkeypatch.setattr(devices, "cuda_device_count", lambda: 1)
    assert run_config("offload=block").offload.to == "cpu"


def test_skip_patterns_come_from_a_file_with_comments(tmp_path: Path) -> None:
    path = tmp_path / "skip.txt"
    path.write_text("# sensitive layers\nblocks.0.attn\n\n**.modulation  # adaLN\nx_embed\n")
    patterns = run_config(f"skip_modules=@{path}").components["transformer"].skip_modules
    assert patterns == ("**.modulation", "blocks.0.attn", "proj_out", "x_embed")
    path.write_bytes(b"\xff\xfe\x00")
    assert "it is not UTF-8 text" in message_of(f"skip_modules=@{path}")


def test_the_same_patterns_in_another_place_are_the_same_experiment() -> None:
    elsewhere = run_config("skip_modules=[h,g,f,e,d,c,b,a]")
    assert elsewhere == run_config("model.skip_modules=[x_embed,a,b,c,d,e,f,g,h,proj_out]")
    assert elsewhere.components["transformer"].skip_modules == (*"abcdefgh", "proj_out", "x_embed")


def test_a_component_overrides_the_settings_of_all(tmp_path: Path) -> None:
    config = run_config(
        "backend=torchao",
        "compute_dtype=bf16",
        "+backend@components.transformer.backend=quanto_int4",
        "+components.transformer.skip_modules=[blocks.1]",
        "+components.transformer.keep_in_fp32_modules=[norm_out]",
    )
    transformer = config.components["transformer"]
    assert (transformer.backend.quant_method, transformer.backend.weights_dtype) == ("quanto", "int4")
    assert transformer.skip_modules == ("blocks.1",)
    assert transformer.keep_in_fp32_modules == ("norm_out",)
    assert transformer.compute_dtype == "bfloat16"
    assert run_config("compute_dtype=bf16", "+components.transformer.compute_dtype=null") == run_config()


def test_the_dense_baseline_may_say_low_cpu_mem_usage_false() -> None:
    assert run_config("backend=none", "low_cpu_mem_usage=false") == run_config("backend=none")


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        (
            {"quant_method": "quanto", "weight_dtype": "int4"},
            "backend.weight_dtype is not a known field (did you mean weights",
        ),
        ({"quant_method": "quanto", "weights_dtype": 4}, "backend.weights_dtype=4 must be a string"),
        ({"quant_method": "qanto"}, "backend.quant_method=qanto is unknown (did you mean quanto?); use bitsandbytes"),
        ({"weights_dtype": "int4"}, "backend.quant_method is missing; use bitsandbytes"),
        ({"quant_method": "bitsandbytes", "llm_int8_threshold": True}, "llm_int8_threshold=True must be a number"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": 1}, "load_in_4bit=1 must be true or false"),
        ({"quant_method": "quanto", "modules_to_not_convert": "a"}, "must be a list, such as [a,b]"),
        ("quanto", "backend=quanto must be a group of fields, not a name"),
    ],
)
def test_a_yaml_without_a_schema_is_checked_all_the_same(backend: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        to_run_config({**settings(), "backend": backend})
    assert message in str(caught.value)


def test_whole_numbers_are_numbers() -> None:
    assert run_config("backend=bitsandbytes_int8", "backend.llm_int8_threshold=4") == run_config(
        "backend=bitsandbytes_int8", "backend.llm_int8_threshold=4.0"
    )


def test_a_stored_config_of_another_version_is_refused() -> None:
    container = run_config().to_container()
    with pytest.raises(ConfigError, match="loader is missing"):
        run_config_from_container({name: value for name, value in container.items() if name != "loader"})
    with pytest.raises(ConfigError, match="sede is not a known field"):
        run_config_from_container({**container, "sede": 3})
    container["components"]["transformer"]["backend"]["quant_method"] = "gguff"
    with pytest.raises(ConfigError, match=r"components.transformer.backend.quant_method=gguff"):
        run_config_from_container(container)


def test_a_round_trip_leaves_no_model_to_save() -> None:
    with pytest.raises(ConfigError, match=r"save\.path=x with task=roundtrip: .* leaves no model to save"):
        run_config("task=roundtrip", "save.path=x")


def quantized_folder(folder: Path) -> Path:
    """A checkpoint that says that it is quantized, by torchao."""
    folder.mkdir()
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
    config = {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_data": {}}}}
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    return folder


def test_a_backend_that_nobody_asked_for_is_not_missed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = quantized_folder(tmp_path / "quantized")
    run_config(f"model.path={folder}", "task=roundtrip")
    assert "unused" not in capfd.readouterr().err
    run_config(f"model.path={folder}", "task=roundtrip", "backend=quanto")
    assert "is quantized already; unused: quant_method=quanto (the checkpoint has torchao)" in capfd.readouterr().err


def test_a_damaged_reference_is_named_by_its_setting(tmp_path: Path) -> None:
    folder, empty = quantized_folder(tmp_path / "quantized"), tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text("{}")
    (empty / "a.gguf").touch()
    (empty / "b.gguf").touch()
    with pytest.raises(LoadError, match=r"has several \.gguf files .*; set model\.reference_path to one of them"):
        run_config(f"model.path={folder}", f"model.reference_path={empty}", "task=roundtrip")
