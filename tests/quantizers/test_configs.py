"""The configs as dicts and JSON: what diffusers' and transformers' own config classes make of the same arguments."""

import dataclasses
import importlib
import json
from typing import Any

import pytest
import torch

from qexp.errors import ConfigError, LoadError
from qexp.quantizers.bitsandbytes_support.config import BitsAndBytesConfig
from qexp.quantizers.embedded import embedded_config
from qexp.quantizers.gguf import GGUFConfig
from qexp.quantizers.none import NoneConfig
from qexp.quantizers.quanto import QuantoConfig
from tests.backends import BACKENDS, backend_config

ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"load_in_8bit": True, "llm_int8_threshold": 3.0, "llm_int8_skip_modules": ["lm_head", "proj_out"]},
    {"load_in_8bit": True, "llm_int8_enable_fp32_cpu_offload": True, "llm_int8_has_fp16_weight": True},
    {"load_in_4bit": True},
    {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
        "bnb_4bit_quant_storage": torch.float16,
    },
    {"load_in_4bit": True, "bnb_4bit_compute_dtype": "float16", "bnb_4bit_quant_storage": "bfloat16"},
]


def as_file(values: dict[str, Any]) -> dict[str, Any]:
    """A dict as a config.json gives it back."""
    read: dict[str, Any] = json.loads(json.dumps(values))
    return read


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=lambda arguments: "-".join(arguments) or "defaults")
@pytest.mark.parametrize("library", ["diffusers", "transformers"])
def test_bitsandbytes_as_upstream(library: str, arguments: dict[str, Any]) -> None:
    upstream = importlib.import_module(library).BitsAndBytesConfig
    theirs = upstream(**arguments)
    for values in (arguments, theirs.to_dict(), as_file(theirs.to_dict()), vars(theirs)):
        mine = BitsAndBytesConfig.from_dict(values)
        assert mine.to_dict() == theirs.to_dict()
        assert mine.to_diff_dict() == theirs.to_diff_dict()
        assert mine.to_json_string() == theirs.to_json_string()
        assert mine.to_json_string(use_diff=False) == theirs.to_json_string(use_diff=False)
        assert mine.quantization_method() == theirs.quantization_method()
        assert mine.is_quantizable() == theirs.is_quantizable()
    assert upstream.from_dict(mine.to_dict()).to_dict() == theirs.to_dict()


@pytest.mark.parametrize("weights_dtype", ["int8", "int4", "int2", "float8"])
def test_quanto_as_upstream(weights_dtype: str) -> None:
    import diffusers
    import transformers

    theirs = diffusers.QuantoConfig(weights_dtype, modules_to_not_convert=["proj_out"])
    mine = QuantoConfig.from_dict(theirs.to_dict())
    assert mine.to_dict() == theirs.to_dict()
    assert mine.to_json_string(use_diff=False) == theirs.to_json_string(use_diff=False)
    of_transformers = transformers.QuantoConfig(weights_dtype, modules_to_not_convert=["proj_out"])
    assert QuantoConfig.from_dict(of_transformers.to_dict()) == mine


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_config_survives_its_dict(backend: str) -> None:
    config = backend_config(backend)
    for values in (config.to_dict(), config.to_diff_dict()):
        again = type(config).from_dict(as_file(values))
        assert again.to_dict() == config.to_dict()
        for item in dataclasses.fields(config):
            if item.name not in (
                "label",
                "bnb_4bit_compute_dtype",
            ):  # upstream's dict cannot say that it follows the run's
                assert getattr(again, item.name) == getattr(config, item.name)
    assert type(config)().to_diff_dict() == {}
    assert "label" not in config.to_dict()


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_config_says_whether_it_quantizes(backend: str) -> None:
    config = backend_config(backend)
    assert config.is_quantizable() == (backend != "none") == (config.quantization_method() is not None)


def test_dtypes_are_understood_in_every_spelling() -> None:
    for spelling in ("bf16", "bfloat16", "torch.bfloat16", torch.bfloat16):
        assert GGUFConfig.from_dict({"compute_dtype": spelling}).compute_dtype == "bfloat16"
        assert BitsAndBytesConfig(bnb_4bit_compute_dtype=spelling).bnb_4bit_compute_dtype == "bfloat16"  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="bnb_4bit_compute_dtype=int8 is not a compute dtype"):
        BitsAndBytesConfig(bnb_4bit_compute_dtype="int8")


def test_keys_that_say_nothing_are_named(log_lines: list[str]) -> None:
    NoneConfig.from_dict({"_private": 1, "quant_method": "none"})
    assert not log_lines
    QuantoConfig.from_dict({"weights_dtype": "int4", "later": 1, "new": None})
    assert len(log_lines) == 1 and "later, new not known" in log_lines[0]


def test_values_of_a_wrong_type_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"quantization_config\.load_in_4bit='yes' must be true or false"):
        BitsAndBytesConfig.from_dict({"load_in_4bit": "yes"})
    with pytest.raises(ConfigError, match="both true"):
        BitsAndBytesConfig.from_dict({"_load_in_4bit": True, "load_in_8bit": True})
    with pytest.raises(LoadError, match=r"'here': quantization_config of quanto cannot be read: .*weights_dtype"):
        embedded_config({"quantization_config": {"quant_method": "quanto", "weights_dtype": 3}}, "here")


@pytest.mark.parametrize("flag", ["load_in_4bit", "_load_in_8bit"])
def test_old_files_say_only_how_many_bits(flag: str) -> None:
    config = embedded_config({"quantization_config": {flag: True}}, "here")
    assert config.is_quantizable()
    assert config == BitsAndBytesConfig(**{flag.removeprefix("_"): True}, label=config.describe())


def test_a_fields_own_name_wins_over_others_for_it() -> None:
    assert not BitsAndBytesConfig.from_dict({"_load_in_4bit": True, "load_in_4bit": False}).load_in_4bit
    assert BitsAndBytesConfig.from_dict({"_load_in_4bit": True}).load_in_4bit


def test_methods_without_a_reader_are_refused_with_those_that_have_one() -> None:
    for method in ("none", "gptq", None):
        with pytest.raises(LoadError, match=f"quant_method='{method}', which is not supported .supported: bitsandb"):
            embedded_config({"quantization_config": {"quant_method": method}}, "here")
