"""What a quantized model carries, and that nothing of it is left once it is dequantized."""

import json
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qexp.config.offload import OffloadConfig
from qexp.errors import ConfigError
from qexp.loading.quantized_model import registered_quantizer
from qexp.loading.saving import save_model
from qexp.offloading.strategies import apply_offload, offload_of
from qexp.quantizers.base import Quantizer
from tests.backends import CPU, EVERY_WAY_TO_QUANTIZE
from tests.loading.toys import WIDTH, Toy, answer_of, load_in_bf16, load_toy, random_state, save_state, settings
from tests.products import representatives

BF16 = torch.bfloat16
MARKS = ("hf_quantizer", "quantization_method", "_pre_quantization_dtype", "is_loaded_in_4bit", "is_loaded_in_8bit")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_state(tmp_path_factory.mktemp("toy"), random_state(Toy), {"width": WIDTH})


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("backend", EVERY_WAY_TO_QUANTIZE)
def test_is_quantized(backend: str, folder: Path) -> None:
    model = load_in_bf16(folder, backend)
    assert model.is_quantized is True
    assert isinstance(registered_quantizer(model), Quantizer)
    config = settings(backend).backend
    assert getattr(model, "is_loaded_in_4bit", False) == getattr(config, "load_in_4bit", False)
    assert getattr(model, "is_loaded_in_8bit", False) == getattr(config, "load_in_8bit", False)


@pytest.mark.parametrize("backend", EVERY_WAY_TO_QUANTIZE)
def test_dequantize_then_save_then_reload(backend: str, folder: Path, tmp_path: Path) -> None:
    model = load_in_bf16(folder, backend)
    answer_of(model)
    assert model.dequantize() is model
    assert type(model) is Toy and model.is_quantized is False and registered_quantizer(model) is None
    assert not any(hasattr(model, name) for name in MARKS)
    assert {tensor.dtype for name, tensor in model.state_dict().items() if name != "steps"} == {BF16}
    expected = answer_of(model)
    save_model(model, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text()) == {"width": WIDTH}
    again = load_toy(tmp_path / "saved", settings("none")).model
    assert torch.equal(answer_of(again), expected)
    assert model.half().embed.weight.dtype == torch.float16


@pytest.mark.parametrize("backend", ["bitsandbytes", "bitsandbytes_int8", "torchao", "quanto_int4", "gguf"])
def test_a_quantized_checkpoint_dequantized_saves_as_a_plain_one(backend: str, folder: Path, tmp_path: Path) -> None:
    """Of a checkpoint that embeds a quantization_config; GGUF has none that is safetensors."""
    model = load_in_bf16(folder, backend)
    if backend != "gguf":
        save_model(model, tmp_path / "quantized")
        assert "quantization_config" in json.loads((tmp_path / "quantized" / "config.json").read_text())
        model = load_toy(tmp_path / "quantized", settings("none")).model
    save_model(model.dequantize(), tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert torch.equal(answer_of(load_toy(tmp_path / "dense", settings("none")).model), answer_of(model))


def test_dequantize_in_another_dtype(folder: Path) -> None:
    model = load_in_bf16(folder, "torchao").dequantize(torch.float32)
    assert model.embed.weight.dtype == model.embed.bias.dtype == torch.float32
    assert model.blocks[0].norm.weight.dtype == BF16


HELD_APART = ("bitsandbytes_nf4_dq", "bitsandbytes_int8", "torchao", "quanto_int4", "gguf")


@cache  # several cases compare with each
def dequantized_state(backend: str, folder: Path) -> dict[str, Tensor]:
    return state_of(load_in_bf16(folder, backend).dequantize())


@pytest.mark.parametrize(
    ("backend", "to", "strategy"),
    representatives(
        product(HELD_APART, ["cpu", "disk"], ["leaf", "block", "model"]),
        [
            ("bitsandbytes_nf4_dq", "cpu", "block"),
            ("bitsandbytes_int8", "disk", "leaf"),
            ("torchao", "cpu", "leaf"),
            ("torchao", "disk", "block"),
            ("torchao", "cpu", "model"),
            ("torchao", "disk", "model"),
            ("quanto_int4", "disk", "leaf"),
            ("gguf", "cpu", "block"),
        ],
    ),
)
def test_dequantize_while_offloaded(
    backend: str, to: str, strategy: str, folder: Path, tmp_path: Path, log_lines: list[str]
) -> None:
    """The dense model is offloaded in the same way, and is the one that dequantizing first would give."""
    expected = dequantized_state(backend, folder)
    model = load_in_bf16(folder, backend)
    config = OffloadConfig(strategy, to).resolved("cpu")
    offload = apply_offload(model, config, device=CPU, block_lists=["blocks"], store=tmp_path)
    answer_of(model)
    model.dequantize()
    now = offload_of(model)
    assert now is not None and now is not offload and now.config == config
    assert now.statistics()["offload/payload_gib"] > 1.5 * WIDTH**2 * 2 / 2**30
    found = state_of(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not any("still held" in line for line in log_lines)  # by what the quantized layers were
    offloaded = answer_of(model)
    assert now.statistics()["offload/copies"] > 0
    now.remove()
    assert offload_of(model) is None
    assert torch.equal(answer_of(model), offloaded)


def test_dequantize_without_the_weights_is_refused(folder: Path) -> None:
    """As a model is whose weights accelerate's hooks hold."""
    from accelerate import cpu_offload

    model = load_in_bf16(folder, "torchao")
    cpu_offload(model, execution_device=CPU)
    with pytest.raises(ConfigError, match=r"weights of 'Toy' are held by another.*remove_hook_from_module"):
        model.dequantize()
    assert model.is_quantized
