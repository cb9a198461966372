"""The scenarios of the peers' own quantization tests, on our loader and a model of diffusers' class.

Names are those of diffusers 0.42 (`tests/quantization/`, `tests/models/testing_utils/quantization.py`) and
transformers 5 (`tests/quantization/`); the ids are name and backend. Where theirs assert that there is an output, or
"not NaN", these compare with the dense model or bit for bit.

What is shown elsewhere, under these names or as said:
- device_assignment, moving between devices, model_cpu_offload, sequential_cpu_offload, group_offloading, device_map
  over several devices: they need an accelerator; on the fake one, `tests/offloading/on_fake_device/`, and
  `tests/loading/test_device_map.py`
- config_from_pretrained, serialization to and from the peers' own files: `tests/loading/test_interchange.py`
- pickle, deepcopy, dtype_assignment, memory_footprint: `tests/loading/test_quantized_model.py`
- training: `tests/quantizers/test_training.py`
- weights after loading: `tests/quantizers/test_formulas.py`

What is not here, and why:
- model_memory_usage as the peak of device memory: a GPU's allocator; `memory_footprint` and the plan's bytes stand in
- quality, pipeline_inference, generate_quality_dequantize: weights of several GB from a hub
- lora_loading, lora_inference: peft is no dependency; `tests/quantizers/test_training.py` has adapters of its own
- torch_compile: minutes of a compiler for each type
- cuda_kernels of GGUF: a package from a hub, for GPUs
"""

import json
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import qexp
from qexp.errors import ConfigError, LoadError
from qexp.loading.quantized_model import registered_quantizer
from qexp.loading.saving import save_model
from qexp.quantizers.torchao import TorchAoConfig
from tests.backends import CPU, backend_config
from tests.products import representatives

BF16 = torch.bfloat16
# a type of each kind of weight, and the share of the answer that its error may be
BACKENDS = {
    "bitsandbytes": 0.2, "bitsandbytes_fp4": 0.25, "bitsandbytes_nf4_dq": 0.2, "bitsandbytes_int8": 0.05,
    "torchao": 0.03, "torchao_float8wo": 0.06, "quanto": 0.03, "quanto_int4": 0.25, "gguf": 0.03, "gguf_q4_0": 0.2,
    "packed_uint4": 0.2, "packed_fp6_e3w2": 0.1,
}  # fmt: skip
SAFETENSORS = [name for name in BACKENDS if not name.startswith("gguf")]
KEPT = {"bitsandbytes_nf4_dq", "bitsandbytes_int8", "torchao", "quanto_int4", "gguf_q4_0", "packed_uint4"}
every_backend = pytest.mark.parametrize("backend", representatives(BACKENDS, KEPT))
# of what the loader and not the format decides
every_backend_by_loader = pytest.mark.parametrize(
    "backend", representatives(BACKENDS, ["bitsandbytes_int8", "torchao"])
)
every_saved = pytest.mark.parametrize("backend", representatives(SAFETENSORS, KEPT & {*SAFETENSORS}))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.quantizers.peer_transformer import Transformer

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dense")
    Transformer().to(BF16).save_pretrained(folder)
    return folder


def load(folder: Path, backend: str, *overrides: str, kind: Any = None, **fields: Any) -> Any:
    from tests.quantizers.peer_transformer import Transformer

    config, skeleton = backend_config(backend, *overrides), kind or Transformer
    return qexp.load(folder, config, skeleton=skeleton, device="cpu", compute_dtype="bf16", workers=1, **fields)


def load_dense(folder: Path, **options: Any) -> Any:
    """By the peer's own loader."""
    from tests.quantizers.peer_transformer import Transformer

    return Transformer.from_pretrained(folder, **options)


@cache
def unused(folder: Path, backend: str) -> Any:
    """Loaded once for tests that look at it: they neither change nor run it, which moves states of LLM.int8."""
    return load(folder, backend)


def inputs() -> Tensor:
    return torch.randn(2, 8, 128, generator=torch.Generator().manual_seed(1)).to(BF16)


def answer(model: nn.Module) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(inputs())
    return output


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def quantized_layers(model: nn.Module) -> set[str]:
    quantizer = registered_quantizer(model)
    return {name for name, one in linear_layers(model).items() if quantizer is not None and quantizer.is_quantized(one)}


@every_backend_by_loader
def test_quantization_num_parameters(backend: str, dense: Path) -> None:
    assert unused(dense, backend).num_parameters() == load_dense(dense).num_parameters()


@every_backend_by_loader
def test_quantized_layers(backend: str, dense: Path) -> None:
    model = unused(dense, backend)
    assert quantized_layers(model) == set(linear_layers(load_dense(dense))) and len(quantized_layers(model)) == 13


@every_backend
def test_quantization_inference(backend: str, dense: Path) -> None:
    expected, found = answer(load_dense(dense, torch_dtype=BF16)).float(), answer(load(dense, backend))
    assert found.dtype == BF16
    assert 0 < (found.float() - expected).norm() / expected.norm() < BACKENDS[backend]


WAYS: dict[str, Callable[[Any, Path], object]] = {
    "save_pretrained": lambda model, folder: model.save_pretrained(folder),
    "save_model": save_model,
    "sharded": lambda model, folder: save_model(model, folder, max_shard_bytes=30_000),
}


@pytest.mark.parametrize(
    ("backend", "way"),
    [
        *representatives(
            product(SAFETENSORS, WAYS),
            [
                *((name, "save_pretrained") for name in SAFETENSORS if name in KEPT),
                *product(["torchao"], ["save_model", "sharded"]),
                ("bitsandbytes_int8", "sharded"),
            ],
        ),
        *product(["gguf", "gguf_q4_0"], ["save_model"]),
    ],
)
def test_serialization(backend: str, way: str, dense: Path, tmp_path: Path) -> None:
    model = load(dense, backend)
    WAYS[way](model, tmp_path)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 3) == (way == "sharded")
    again = load(tmp_path, "none")
    assert quantized_layers(again) == quantized_layers(model)
    assert torch.equal(answer(again), answer(model))
    assert again.get_memory_footprint() == model.get_memory_footprint()


@every_backend_by_loader
def test_modules_to_not_convert(backend: str, dense: Path) -> None:
    model, whole = load(dense, backend, skip_modules=("blocks.0", "proj_out")), unused(dense, backend)
    left = {name for name in linear_layers(model) if name.startswith("blocks.0.") or name == "proj_out"}
    assert len(left) == 7 and quantized_layers(model) == set(linear_layers(model)) - left
    assert all(type(linear_layers(model)[name]) is nn.Linear for name in left)
    assert model.get_memory_footprint() > whole.get_memory_footprint()


@pytest.mark.parametrize("backend", ["bitsandbytes", "bitsandbytes_int8"])
def test_llm_skip(backend: str, dense: Path) -> None:
    model = load(dense, backend, "llm_int8_skip_modules=[proj_out]")
    assert type(model.proj_out) is nn.Linear and model.proj_out.weight.dtype == BF16
    assert type(model.blocks[0].attn.to_q) is not nn.Linear


@every_backend_by_loader
def test_keep_modules_in_fp32(backend: str, dense: Path) -> None:
    from tests.quantizers.peer_transformer import Fp32Transformer

    model = load(dense, backend, kind=Fp32Transformer)
    kept = linear_layers(model)["proj_out"]
    assert type(kept) is nn.Linear and {kept.weight.dtype, kept.bias.dtype} == {torch.float32}
    assert quantized_layers(model) == set(linear_layers(model)) - {"proj_out"}
    assert answer(model).isfinite().all()


@every_backend
def test_dequantize(backend: str, dense: Path, tmp_path: Path) -> None:
    model = load(dense, backend)
    before = answer(model).float()
    assert model.dequantize() is model
    assert all(type(layer) is nn.Linear and layer.weight.dtype == BF16 for layer in linear_layers(model).values())
    assert (answer(model).float() - before).norm() / before.norm() < 0.03  # activations are rounded by some
    assert "quantization_config" not in model.config and not model.is_quantized
    model.save_pretrained(tmp_path)
    again = load_dense(tmp_path, torch_dtype=BF16)
    assert torch.equal(answer(again), answer(model))
    model.to(torch.float16)


@every_backend_by_loader
def test_original_dtype(backend: str, dense: Path, tmp_path: Path) -> None:
    model = unused(dense, backend)
    assert model._pre_quantization_dtype == model.config["_pre_quantization_dtype"] == BF16
    assert "_pre_quantization_dtype" not in load_dense(dense).config
    save_model(model, tmp_path)
    assert "_pre_quantization_dtype" not in (tmp_path / "config.json").read_text()


@every_saved
def test_errors_loading_incorrect_state_dict(backend: str, dense: Path, tmp_path: Path) -> None:
    save_model(unused(dense, backend), tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    key = next(name for name in sorted(tensors) if "blocks.1.attn.to_k" in name and tensors[name].numel() > 1000)
    tensors[key] = tensors[key][:-1].clone()
    metadata = json.loads(file.read_bytes()[8 : 8 + int.from_bytes(file.read_bytes()[:8], "little")])["__metadata__"]
    save_file(tensors, file, metadata)
    with pytest.raises(LoadError, match=r"blocks\.1\.attn\.to_k"):
        load(tmp_path, "none")


@every_backend
def test_quantization_config_json_serialization(backend: str, dense: Path) -> None:
    model = load(dense, backend)
    config = model.config["quantization_config"]
    assert config.to_dict()["quant_method"] in ("bitsandbytes", "torchao", "quanto", "gguf", "qexp_packed")
    ours = registered_quantizer(model).config  # type: ignore[union-attr]
    described = json.loads(ours.to_json_string(use_diff=False))
    assert type(ours).from_dict(described) == type(ours).from_dict(ours.to_dict())
    assert ours.to_diff_dict().items() <= ours.to_dict().items()
    json.dumps({name: str(value) for name, value in config.to_dict().items()})


@pytest.mark.parametrize(
    ("backend", "field"),
    [
        ("bitsandbytes", "bnb_4bit_quant_storage=add"),
        ("bitsandbytes", "bnb_4bit_quant_type=int4"),
        ("bitsandbytes", "load_in_8bit=true"),
        ("torchao", "quant_type=uint8"),
        ("quanto", "weights_dtype=int3"),
        ("gguf", "quant_type=Q9_0"),
        ("packed_uint4", "quant_type=uint9wo"),
    ],
)
def test_wrong_config(backend: str, field: str) -> None:
    with pytest.raises(ValueError, match=field.partition("=")[0]):
        backend_config(backend, field)


@every_backend
def test_warning_for_no_quantization(backend: str, dense: Path) -> None:
    """The peers warn that no linear layer was found, and go on; here that is an error."""
    with pytest.raises(LoadError, match="would have quantized no layer"):
        load(dense, backend, skip_modules=("**",))


@every_backend
def test_buffers_device_assignment(backend: str, dense: Path) -> None:
    buffers = dict(load(dense, backend).named_buffers())
    assert "position" in buffers and all(buffer.device == CPU for buffer in buffers.values())
    assert torch.equal(buffers["position"], torch.linspace(0, 1, 128).to(BF16))


@every_backend
def test_quantization_keeps_outliers_and_zeros(backend: str, dense: Path, tmp_path: Path) -> None:
    """A weight 100 times the largest other stays that large; rows of zeros stay zeros, whatever scale they get."""
    network = load_dense(dense)
    name = "blocks.0.attn.to_q"
    with torch.no_grad():
        weight = network.get_submodule(name).weight
        outlier = 100 * weight.abs().max().item()
        weight[3, 5] = outlier
        weight[7] = 0
    network.save_pretrained(tmp_path)
    restored = load(tmp_path, backend).dequantize().get_submodule(name).weight.float()
    assert restored.isfinite().all()
    assert restored[3, 5].item() == pytest.approx(outlier, rel=0.15)
    assert restored[7].abs().max() == 0


@pytest.mark.parametrize(
    ("backend", "name"), [("gguf", "Q8_0"), ("gguf_q4_0", "Q4_0"), ("gguf_q4_1", "Q4_1"), ("gguf_q5_0", "Q5_0")]
)
def test_gguf_parameters(backend: str, name: str, dense: Path) -> None:
    layers = linear_layers(load(dense, backend))
    assert {getattr(layer.weight, "quant_type", None) for layer in layers.values()} == {name}


def test_post_init_check() -> None:
    with pytest.raises(ConfigError, match="group_size1 is not an argument of int8wo"):
        TorchAoConfig(quant_type="int8wo", quant_type_kwargs={"group_size1": 32})
