"""Files of mixed models: whoever opens the format that holds all layers opens them with the same output, bit for bit;
what no such format can hold is refused by every other program."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

import qexp
from qexp.config.backend_options import backend_of
from qexp.loading.saving import save_model
from tests.backends import backend_config
from tests.loading.test_foreign_readers import IDS, bert, mistral
from tests.loading.test_gguf_interchange import answer, assert_same_weights, flux
from tests.loading.test_gguf_interchange import load_theirs as load_single_file
from tests.loading.test_interchange import (
    assert_same_answer,
    assert_same_files,
    dense,
    embedded,
    load_theirs,
    load_tiny,
)
from tests.products import representatives

__all__ = ["dense", "flux"]  # fixtures
pytestmark = pytest.mark.usefixtures("open_gate")
FLUX_RULES: list[dict[str, Any]] = [
    {"modules": ["proj_out", "norm_out.linear"], "backend": "none"},
    {"modules": "transformer_blocks", "backend": "gguf", "quant_type": "Q5_1"},
    {"modules": "single_transformer_blocks.*.attn", "backend": "gguf"},
    {"backend": "gguf_q4_0"},
]


def mixed(*rules: dict[str, Any]) -> Any:
    return backend_of("mixed", {"recipe": list(rules)})


# GGUF: a type for each tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_gguf_types_differ_by_tensor_and_diffusers_opens_them(dtype: torch.dtype, flux: Path, tmp_path: Path) -> None:
    from diffusers import FluxTransformer2DModel

    ours: Any = qexp.load(flux, mixed(*FLUX_RULES), device="cpu", compute_dtype=dtype)
    files = qexp.save(ours, tmp_path)
    assert [file.name for file in files] == ["config.json", "model.gguf"]
    stored = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert stored["transformer_blocks.0.attn.to_q.weight"] == "Q5_1"
    assert stored["single_transformer_blocks.0.attn.to_q.weight"] == "Q8_0"
    assert stored["single_transformer_blocks.0.proj_mlp.weight"] == "Q4_0"
    assert stored["proj_out.weight"] == stored["norm_out.linear.weight"] == "F32"
    theirs = load_single_file(FluxTransformer2DModel, tmp_path / "model.gguf", tmp_path, dtype)
    assert_same_weights(ours, theirs)
    again: Any = qexp.load(tmp_path, device="cpu")
    assert torch.equal(answer(again), answer(ours))
    weights, others = (again.state_dict(), ours.state_dict())
    assert all(type(weights[name]) is type(others[name]) for name in others)
    difference = (answer(theirs) - answer(ours)).float().norm() / answer(ours).float().norm()
    assert difference < (1e-3 if dtype == torch.float32 else 0.02)  # they decode in fp16


def test_gguf_decoded_as_diffusers_decodes_gives_its_output(flux: Path, tmp_path: Path) -> None:
    """What differs between the two programs is where they round; with their decoded weights, outputs are equal."""
    from diffusers import FluxTransformer2DModel
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

    ours: Any = qexp.load(flux, mixed(*FLUX_RULES), device="cpu", compute_dtype="fp32")
    qexp.save(ours, tmp_path)
    theirs = load_single_file(FluxTransformer2DModel, tmp_path / "model.gguf", tmp_path)
    expected, decoded = answer(theirs), 0
    ours.dequantize()
    for name, module in theirs.named_modules():
        if hasattr(getattr(module, "weight", None), "quant_type"):
            weight = dequantize_gguf_tensor(module.weight).float()
            torch.testing.assert_close(weight, ours.get_submodule(name).weight, rtol=2e-3, atol=1e-4)
            ours.get_submodule(name).weight.data = weight
            decoded += 1
    assert decoded > 10 and torch.equal(answer(ours), expected)


# torchao: a config for each layer


AO_RULES: list[dict[str, Any]] = [{"modules": "first", "backend": "torchao"}, {"modules": "plain", "backend": "none"},
            {"backend": "torchao", "quant_type": "int4dq"}]  # fmt: skip


def test_torchao_names_every_layer_and_diffusers_opens_it(dense: Path, tmp_path: Path) -> None:
    ours = load_tiny(dense, mixed(*AO_RULES))
    save_model(ours, tmp_path / "ours")
    described = embedded(tmp_path / "ours")
    assert described["quant_method"] == "torchao"
    by_name = described["quant_type"]["default"]["_data"]["fqn_to_config"]
    assert by_name["plain"] is None and set(by_name) == {"first", "second", "plain"}
    assert by_name["first"]["_type"] == "Int8WeightOnlyConfig"
    assert by_name["second"]["_type"] == "Int8DynamicActivationIntxWeightConfig"
    theirs = load_theirs(tmp_path / "ours")
    assert_same_answer(theirs, ours)
    assert type(theirs.first.weight) is type(ours.first.weight) and type(theirs.plain.weight) is torch.nn.Parameter
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same_files(tmp_path / "theirs", tmp_path / "ours")
    for folder in ("ours", "theirs"):
        again = load_tiny(tmp_path / folder, backend_config("none"))
        assert again.hf_quantizer.quantizer.layer_format("first") == "torchao int8wo"
        assert again.hf_quantizer.quantizer.layer_format("second") == "torchao int4dq"
        assert_same_answer(again, ours)


def test_diffusers_quantizes_by_the_config_that_is_written(dense: Path, tmp_path: Path) -> None:
    """The same FqnToConfig, given to diffusers with the dense checkpoint, makes the same bytes."""
    import diffusers

    save_model(load_tiny(dense, mixed(*AO_RULES)), tmp_path / "ours")
    config = diffusers.TorchAoConfig.from_dict(embedded(tmp_path / "ours"))
    load_theirs(dense, config).save_pretrained(tmp_path / "theirs")
    assert_same_files(tmp_path / "theirs", tmp_path / "ours")
    assert embedded(tmp_path / "theirs") == embedded(tmp_path / "ours")


# bitsandbytes and quanto


def test_four_bits_of_every_kind_share_a_file_that_diffusers_opens(dense: Path, tmp_path: Path) -> None:
    rules: list[dict[str, Any]] = [
        {"modules": "first", "backend": "bitsandbytes_fp4", "bnb_4bit_blocksize": 128},
        {"modules": "plain", "backend": "none"},
        {"backend": "bitsandbytes_nf4_dq"},
    ]
    ours = load_tiny(dense, mixed(*rules))
    save_model(ours, tmp_path / "ours")
    assert embedded(tmp_path / "ours")["quant_method"] == "bitsandbytes"
    theirs = load_theirs(tmp_path / "ours")
    assert theirs.first.weight.quant_state.quant_type == "fp4" and theirs.first.weight.quant_state.blocksize == 128
    assert theirs.second.weight.quant_state.nested and not theirs.first.weight.quant_state.nested
    assert_same_answer(theirs, ours)
    again = load_tiny(tmp_path / "ours", backend_config("none"))
    assert_same_answer(again, ours)
    save_model(again, tmp_path / "again")
    assert_same_files(tmp_path / "again", tmp_path / "ours")


@pytest.mark.parametrize("backend", ["bitsandbytes", "bitsandbytes_int8", "quanto", "quanto_int2"])
def test_one_format_and_dense_layers_are_that_formats_file(backend: str, dense: Path, tmp_path: Path) -> None:
    ours = load_tiny(dense, mixed({"modules": "plain", "backend": "none"}, {"backend": backend}))
    uniform = load_tiny(dense, backend_config(backend), ("plain",))
    for model, name in ((ours, "ours"), (uniform, "uniform")):
        save_model(model, tmp_path / name)
    assert embedded(tmp_path / "ours") == embedded(tmp_path / "uniform")
    assert_same_files(tmp_path / "ours", tmp_path / "uniform")
    theirs = load_theirs(tmp_path / "ours")
    if "quanto" not in backend:  # whose kernels depend on where diffusers' mapping of the file puts the weight
        assert_same_answer(theirs, ours)
        return
    for name in ("first", "second"):
        weights = (model.get_submodule(name).weight.dequantize() for model in (ours, theirs))
        assert torch.equal(*weights), name


# Everything else

EVERY_LIBRARY: list[dict[str, Any]] = [
    {"modules": "first", "backend": "torchao"},
    {"modules": "second", "backend": "quanto"},
    {"backend": "gguf_q4_0"},
]


def test_diffusers_refuses_what_no_format_holds(dense: Path, tmp_path: Path) -> None:
    ours = load_tiny(dense, mixed(*EVERY_LIBRARY))
    save_model(ours, tmp_path / "ours")
    assert embedded(tmp_path / "ours")["quant_method"] == "qexp_mixed"
    with pytest.raises(ValueError, match="Unknown quantization type, got qexp_mixed"):
        load_theirs(tmp_path / "ours")
    assert_same_answer(load_tiny(tmp_path / "ours", backend_config("none")), ours)
    ours.save_pretrained(tmp_path / "by_library")  # diffusers' own method, with our quantizer behind it
    assert_same_files(tmp_path / "by_library", tmp_path / "ours")
    assert_same_answer(load_tiny(tmp_path / "by_library", backend_config("none")), ours)


OF_TRANSFORMERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "torchao and int8": ({"backend": "torchao"}, {"backend": "bitsandbytes_int8"}),
    "int8 of two thresholds": (
        {"backend": "bitsandbytes_int8", "llm_int8_threshold": 0},
        {"backend": "bitsandbytes_int8"},
    ),
    "quanto of two": ({"backend": "quanto"}, {"backend": "quanto_float8"}),
    "quanto and torchao": ({"backend": "quanto"}, {"backend": "torchao"}),
    "gguf and packed": ({"backend": "gguf"}, {"backend": "packed_uint4"}),
}


@pytest.mark.parametrize(
    "case", representatives(OF_TRANSFORMERS, ["torchao and int8", "int8 of two thresholds", "gguf and packed"])
)
def test_transformers_refuses_it_too(case: str, tmp_path: Path) -> None:
    from transformers import BertModel

    one, other = OF_TRANSFORMERS[case]
    torch.manual_seed(0)
    bert().save_pretrained(tmp_path / "dense")
    rules = [{"modules": "**.query", **one}, other]
    model: Any = qexp.load(tmp_path / "dense", mixed(*rules), device="cpu", compute_dtype="fp32")
    qexp.save(model, tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "qexp_mixed"
    with pytest.raises(RuntimeError, match="mismatch"):
        BertModel.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    again: Any = qexp.load(tmp_path / "saved", device="cpu", compute_dtype="fp32")
    assert torch.equal(again(IDS)[0], model(IDS)[0])


def test_transformers_opens_a_mixture_of_torchao(tmp_path: Path) -> None:
    from transformers import MistralForCausalLM

    torch.manual_seed(0)
    mistral().save_pretrained(tmp_path / "dense")
    rules: list[dict[str, Any]] = [
        {"modules": "model.layers.0.mlp", "backend": "torchao", "quant_type": "float8wo_e4m3"},
        {"modules": "**.o_proj", "backend": "none"},
        {"backend": "torchao"},
    ]
    model: Any = qexp.load(tmp_path / "dense", mixed(*rules), device="cpu", compute_dtype="fp32")
    qexp.save(model, tmp_path / "saved")
    values = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    by_name = values["quant_type"]["default"]["_data"]["fqn_to_config"]
    assert by_name["model.layers.0.self_attn.o_proj"] is by_name["lm_head"] is None
    theirs = MistralForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    assert type(theirs.model.layers[0].self_attn.q_proj.weight).__name__ == "Int8Tensor"
    with torch.no_grad():
        assert torch.equal(theirs(IDS)[0], model(IDS)[0])
