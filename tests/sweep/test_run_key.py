import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from qexp.config.generate import GenerateConfig, for_images
from qexp.config.schema import (
    IsolationConfig,
    LoaderConfig,
    MetricsConfig,
    OffloadConfig,
    PathsConfig,
    ReferenceConfig,
    SweepConfig,
    TrackingConfig,
)
from qexp.errors import LoadError
from qexp.experiments.reference import reference_config
from qexp.models.digits import DigitsModelConfig
from qexp.quantizers.bitsandbytes_support.config import BitsAndBytesConfig
from qexp.quantizers.none import NoneConfig
from qexp.quantizers.torchao import TorchAoConfig
from qexp.sweep import run_key as key
from qexp.sweep.run_key import reference_key, run_key
from qexp.tasks.roundtrip import RoundtripConfig
from tests.sweep.settings import run_config, with_backend, write_checkpoint

INT8 = BitsAndBytesConfig(load_in_8bit=True)
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")

SAME = {
    "metrics": lambda c: replace(c, metrics=MetricsConfig(names=("ssim",))),
    "tracking": lambda c: replace(c, tracking=TrackingConfig(mode="online", project="other", tags=("x",))),
    "resume": lambda c: replace(c, resume="none"),
    "isolation": lambda c: replace(c, isolation=IsolationConfig(timeout_minutes=3.0)),
    "sweep": lambda c: replace(c, sweep=SweepConfig(name="other", notes="why")),
    "paths": lambda c: replace(c, paths=PathsConfig(outputs="elsewhere")),
    "loader": lambda c: replace(c, loader=LoaderConfig(in_flight_mib=1, workers=1)),
    "label": lambda c: with_backend(c, replace(NF4, label="mine")),
    "threshold of int8 in 4 bit": lambda c: with_backend(c, replace(NF4, llm_int8_threshold=1.0)),
    "how the reference is offloaded": lambda c: replace(c, reference=ReferenceConfig(offload="leaf")),
    "7 and 7.0": lambda c: replace(c, task=for_images(GenerateConfig(num_images=1, guidance_scale=1))),
}
OTHER = {
    "seed": lambda c: replace(c, seed=1),
    "task": lambda c: replace(c, task=for_images(GenerateConfig(num_images=2))),
    "guidance": lambda c: replace(c, task=for_images(GenerateConfig(num_images=1, guidance_scale=1.5))),
    "offload": lambda c: replace(c, offload=OffloadConfig(strategy="leaf", to="disk")),
    "offload destination": lambda c: replace(c, offload=OffloadConfig(strategy="leaf", to="cpu")),
    "device": lambda c: replace(c, device="cuda:0"),
    "device index": lambda c: replace(c, device="cuda:1"),
    "quantized type": lambda c: with_backend(c, replace(NF4, bnb_4bit_quant_type="fp4")),
    "double quantization": lambda c: with_backend(c, replace(NF4, bnb_4bit_use_double_quant=True)),
    "int8": lambda c: with_backend(c, INT8),
    "int8 threshold": lambda c: with_backend(c, replace(INT8, llm_int8_threshold=1.0)),
    "backend": lambda c: with_backend(c, TorchAoConfig()),
    "skip list": lambda c: with_backend(c, NF4, skip_modules=("proj_out",)),
    "fp32 list": lambda c: with_backend(c, NF4, keep_in_fp32_modules=("proj_out",)),
    "compute dtype": lambda c: with_backend(c, NF4, compute_dtype="bfloat16"),
    "a second component": lambda c: replace(c, components={**c.components, "encoder": c.components["transformer"]}),
    "reference dtype": lambda c: replace(c, reference=ReferenceConfig(dtype="float32")),
}


@pytest.mark.parametrize("change", SAME)
def test_settings_that_cannot_change_the_result_keep_the_key(change: str, tmp_path) -> None:
    config = run_config(tmp_path)
    changed = SAME[change](config)
    assert changed != config or change == "7 and 7.0"
    assert run_key(changed) == run_key(config)


def test_settings_that_can_change_the_result_all_give_keys_of_their_own(tmp_path) -> None:
    config = run_config(tmp_path)
    keys = {name: run_key(change(config)) for name, change in OTHER.items()} | {"unchanged": run_key(config)}
    assert len(set(keys.values())) == len(keys), keys
    assert all(re.fullmatch("[0-9a-f]{16}", one) for one in keys.values())


def test_a_new_setting_is_part_of_the_key_until_it_is_declared_not_to_be(tmp_path) -> None:
    config = run_config(tmp_path)
    considered = set(key._identity(config)) - {"checkpoints", "side_files", "schema"}
    assert considered == {"model", "components", "offload", "task", "reference", "device", "seed"}
    placed = replace(config, device_map="auto", max_memory={"cpu": 10**9})  # not in the keys of runs without them
    considered = set(key._identity(placed)) - {"checkpoints", "side_files", "schema"}
    assert considered | key.NOT_IN_KEY >= set(config.to_container())
    assert considered > {"device_map", "max_memory"}
    assert run_key(placed) != run_key(replace(placed, max_memory={"cpu": 10**8})) != run_key(config)
    assert key.reference_key(placed) == key.reference_key(config)


def test_four_bit_settings_do_not_count_in_eight_bit(tmp_path) -> None:
    config = with_backend(run_config(tmp_path), INT8)
    fields = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "float32"}
    for name, value in fields.items():
        assert run_key(with_backend(config, replace(INT8, **{name: value}))) == run_key(config), name


def test_a_checkpoint_counts_by_its_content_and_not_by_its_place(tmp_path) -> None:
    config = run_config(tmp_path)
    (tmp_path / "checkpoint").rename(tmp_path / "moved")
    moved = replace(config, model=DigitsModelConfig(path=str(tmp_path / "moved")))
    before = run_key(moved)
    (tmp_path / "moved").rename(tmp_path / "checkpoint")
    assert run_key(config) == before

    header_changed = tmp_path / "checkpoint" / "config.json"
    header_changed.write_text(json.dumps({"width": 256}))
    assert run_key(config) != before


def test_new_weights_in_the_same_place_are_another_experiment(tmp_path) -> None:
    config = run_config(tmp_path)
    before = run_key(config)
    write_checkpoint(tmp_path / "checkpoint", value=2.0)
    assert run_key(config) != before


def test_a_missing_checkpoint_is_a_load_error(tmp_path) -> None:
    config = replace(run_config(tmp_path), model=DigitsModelConfig(path=str(tmp_path / "nowhere")))
    with pytest.raises(LoadError, match="nowhere"):
        run_key(config)


def test_the_reference_is_unquantized_in_its_own_dtype(tmp_path) -> None:
    config = with_backend(
        run_config(tmp_path), NF4, compute_dtype="float16", skip_modules=("a",), keep_in_fp32_modules=("b",)
    )
    config = replace(config, reference=ReferenceConfig(dtype="float32", offload="leaf"))
    reference = reference_config(config)
    component = reference.components["transformer"]
    assert component.backend == NoneConfig()
    assert component.compute_dtype == "float32"
    assert component.skip_modules == component.keep_in_fp32_modules == ()
    assert reference.offload == OffloadConfig(
        strategy="leaf", to="disk", use_stream=True
    )  # auto is disk where there is no accelerator
    assert (reference.task, reference.seed, reference.model) == (config.task, config.seed, config.model)


@pytest.mark.parametrize("change", ["quantized type", "skip list", "compute dtype", "offload", "int8", "backend"])
def test_candidates_share_one_reference(change: str, tmp_path) -> None:
    config = run_config(tmp_path)
    assert reference_key(OTHER[change](config)) == reference_key(config)


def test_the_reference_does_not_depend_on_how_it_is_offloaded_or_on_which_gpu(tmp_path) -> None:
    config = run_config(tmp_path)
    assert reference_key(SAME["how the reference is offloaded"](config)) == reference_key(config)
    assert reference_key(replace(config, device="cuda:0")) == reference_key(replace(config, device="cuda:1"))


@pytest.mark.parametrize("change", ["seed", "task", "device", "reference dtype", "guidance"])
def test_another_question_needs_another_reference(change: str, tmp_path) -> None:
    config = run_config(tmp_path)
    assert reference_key(OTHER[change](config)) != reference_key(config)


def test_new_library_versions_need_another_reference_but_not_another_run_key(tmp_path, monkeypatch) -> None:
    config = run_config(tmp_path)
    before = run_key(config), reference_key(config)
    monkeypatch.setattr(key, "versions_of", lambda packages: dict.fromkeys(packages, "99"))
    assert run_key(config) == before[0]
    assert reference_key(config) != before[1]


def test_the_reference_setting_does_not_matter_where_nothing_is_compared(tmp_path) -> None:
    config = replace(run_config(tmp_path), task=RoundtripConfig())
    assert run_key(config) == run_key(replace(config, reference=ReferenceConfig(dtype="float32")))


def test_roundtrip_has_one_key_whatever_the_offload_and_the_seed(tmp_path: Path) -> None:
    one = run_config(tmp_path, task=RoundtripConfig())
    assert run_key(one) == run_key(replace(one, seed=3, offload=OffloadConfig("leaf", "disk")))
