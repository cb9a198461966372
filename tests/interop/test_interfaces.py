"""Models of diffusers and transformers, loaded by us: what those libraries' own classes then do with them.

diffusers refuses bitsandbytes without a GPU though the library runs on CPUs; that gate is patched open here.
"""

import copy
import json
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import qexp
from qexp.errors import ConfigError
from qexp.quantizers.base import Quantizer
from tests.products import representatives

pytestmark = pytest.mark.usefixtures("open_gate")
BF16 = torch.bfloat16
SAVED = ["bitsandbytes", "bitsandbytes_nf4_dq", "bitsandbytes_int8", "torchao", "torchao_float8wo", "quanto"]
BACKENDS = [*SAVED, "gguf", "packed_fp6_e3w2"]


def flux() -> Any:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=64, pooled_projection_dim=64, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip


def pixart() -> Any:
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=1, sample_size=8,
        cross_attention_dim=64, caption_channels=64, norm_type="ada_norm_single", use_additional_conditions=False,
    )  # fmt: skip


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2))


MODELS: dict[str, Callable[[], Any]] = {"flux": flux, "pixart": pixart, "llama": llama}
# by default, one backend for each way to write its file, and two that write none
PAIRS = representatives(
    product(MODELS, BACKENDS),
    [("pixart", "bitsandbytes_nf4_dq"), ("llama", "bitsandbytes_int8"), ("flux", "torchao"), ("llama", "quanto"),
     ("flux", "gguf"), ("pixart", "packed_fp6_e3w2")],
)  # fmt: skip
# and where their files are not looked at, one backend for each way to hold bytes
WAYS = representatives(
    product(MODELS, BACKENDS),
    [("flux", "bitsandbytes_nf4_dq"), ("pixart", "bitsandbytes_int8"), ("llama", "torchao"), ("flux", "quanto"),
     ("llama", "gguf"), ("pixart", "packed_fp6_e3w2")],
)  # fmt: skip


@cache
def kind_of(name: str) -> Any:
    return type(MODELS[name]())


def interface_of(name: str) -> Any:
    from diffusers.quantizers.base import DiffusersQuantizer
    from transformers.quantizers.base import HfQuantizer

    return HfQuantizer if name == "llama" else DiffusersQuantizer


def answer(model: Any) -> Tensor:
    from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel

    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(BF16)

    arguments: dict[str, Any] = {"input_ids": torch.arange(10)[None]}
    if isinstance(model, FluxTransformer2DModel):
        arguments = {
            "hidden_states": random(1, 16, 64), "encoder_hidden_states": random(1, 8, 64),
            "pooled_projections": random(1, 64), "timestep": torch.tensor([1.0]),
            "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(8, 3),
        }  # fmt: skip
    if isinstance(model, PixArtTransformer2DModel):
        arguments = {
            "hidden_states": random(1, 4, 8, 8), "encoder_hidden_states": random(1, 8, 64),
            "timestep": torch.tensor([1]), "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }  # fmt: skip
    with torch.no_grad():
        output: Tensor = model(**arguments)[0]
    return output


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each model saved by its own library."""
    saved = {}
    for name, build in MODELS.items():
        torch.manual_seed(0)
        saved[name] = tmp_path_factory.mktemp(name)
        build().to(BF16).save_pretrained(saved[name])
    return saved


def close(one: Tensor, other: Tensor, tolerance: float = 0.03) -> bool:
    return bool((one.float() - other.float()).norm() < tolerance * other.float().norm())


@pytest.mark.parametrize(("name", "backend"), WAYS)
def test_what_their_classes_ask_of_a_model(name: str, backend: str, folders: dict[str, Path]) -> None:
    model: Any = qexp.load(folders[name], backend, device="cpu")
    kind = kind_of(name)
    assert isinstance(model, kind) and isinstance(model.hf_quantizer, interface_of(name))
    assert isinstance(model.hf_quantizer.quantizer, Quantizer)
    assert model.hf_quantizer.quantization_config.quant_method == model.quantization_method
    assert model.config["quantization_config"] if name != "llama" else model.config.quantization_config
    assert model.is_quantized and model.dtype == BF16 and model.device.type == "cpu"
    assert model.get_memory_footprint() == qexp.memory_footprint(model)
    expected = answer(model)
    for cast in (lambda: model.to(torch.float16), lambda: model.to("cpu", torch.float16), model.half, model.float):
        with pytest.raises(ConfigError, match="cannot be cast"):
            cast()
    assert torch.equal(answer(model.to("cpu")), expected)
    assert torch.equal(answer(copy.deepcopy(model)), expected)


@pytest.mark.parametrize(("name", "backend"), PAIRS)
def test_save_pretrained(name: str, backend: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Their files are ours, to the byte; they and we load them again."""
    model: Any = qexp.load(folders[name], backend, device="cpu")
    expected = answer(model)
    if backend == "gguf" or (name, backend) == ("llama", "quanto"):
        with pytest.raises(ValueError, match="is not serializable"):
            model.save_pretrained(tmp_path / "theirs")
        return
    model.save_pretrained(tmp_path / "theirs")
    qexp.save(model, tmp_path / "ours")
    files = [
        {file.name: file.read_bytes() for file in (tmp_path / who).glob("*.safetensors")} for who in ("theirs", "ours")
    ]
    assert files[0].keys() == files[1].keys()
    configs = [json.loads((tmp_path / who / "config.json").read_text()) for who in ("theirs", "ours")]
    assert configs[0].get("_class_name") == configs[1].get("_class_name")
    ours = configs[1]["quantization_config"]
    theirs = configs[0]["quantization_config"]  # of their class, which may lack a field or have one more
    shared = ours.keys() & theirs.keys()
    assert len(shared) >= 3 and all(ours[entry] == theirs[entry] for entry in shared)
    assert "_pre_quantization_dtype" not in configs[0]
    for who in ("theirs", "ours"):
        assert torch.equal(answer(qexp.load(tmp_path / who, device="cpu")), expected)
        if "packed" not in backend:  # a format that they do not know, and say so
            again = kind_of(name).from_pretrained(tmp_path / who, torch_dtype=BF16)
            assert close(answer(again), expected)


@pytest.mark.parametrize(("name", "backend"), WAYS)
def test_dequantize(name: str, backend: str, folders: dict[str, Path], tmp_path: Path) -> None:
    model: Any = qexp.load(folders[name], backend, device="cpu")
    kind, expected = kind_of(name), answer(model)
    assert model.dequantize() is model
    assert type(model) is kind and not model.is_quantized and not hasattr(model, "hf_quantizer")
    assert "quantization_config" not in (model.config if name != "llama" else model.config.to_dict())
    assert close(answer(model), expected)
    with pytest.raises(ValueError, match="need to first quantize"):
        model.dequantize()
    model.save_pretrained(tmp_path)
    again = kind.from_pretrained(tmp_path, torch_dtype=BF16)
    assert torch.equal(answer(again), answer(model))
    assert torch.equal(answer(qexp.load(tmp_path, device="cpu")), answer(model))
    assert model.half().dtype == torch.float16


@pytest.mark.parametrize("backend", representatives(BACKENDS, ["bitsandbytes_nf4_dq", "torchao", "gguf"]))
def test_model_cpu_offload(backend: str, folders: dict[str, Path]) -> None:
    """The hook that a pipeline's `enable_model_cpu_offload` puts on each of its models."""
    from accelerate import cpu_offload_with_hook

    model: Any = qexp.load(folders["flux"], backend, device="cpu")
    expected = answer(model)
    _, hook = cpu_offload_with_hook(model, execution_device=torch.device("cpu"))
    assert torch.equal(answer(model), expected)
    hook.offload()
    assert torch.equal(answer(model), expected)
    hook.remove()
    assert close(answer(model.dequantize()), expected)


@pytest.mark.parametrize("backend", [None, "bitsandbytes", "torchao"])
def test_tied_embeddings_and_other_names(backend: str | None, tmp_path: Path) -> None:
    """A checkpoint with the weight of embedding and head once, and one with the names of the base model alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    model: Any = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, tie_word_embeddings=True)).to(BF16)
    model.save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path, torch_dtype=BF16)
    loaded = qexp.load(tmp_path, backend, device="cpu", skip_modules=["lm_head"])
    assert close(answer(loaded), answer(model), 1e-6 if backend is None else 0.25)
    path = tmp_path / "model.safetensors"
    save_file({name.removeprefix("model."): tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    again = qexp.load(tmp_path, backend, device="cpu", skip_modules=["lm_head"])
    assert torch.equal(answer(again), answer(loaded))


def test_training_is_what_transformers_checks(folders: dict[str, Path]) -> None:
    from transformers.trainer_utils import validate_quantization_for_training

    model: Any = qexp.load(folders["llama"], "bitsandbytes", device="cpu")
    assert model.hf_quantizer.is_trainable and not model.hf_quantizer.is_qat_trainable
    with pytest.raises(ValueError, match="attach trainable adapters"):
        validate_quantization_for_training(model)
    model._hf_peft_config_loaded = True
    validate_quantization_for_training(model)


def test_num_parameters_counts_weights_not_bytes(folders: dict[str, Path]) -> None:
    for name, backend in [*product(MODELS, ["bitsandbytes"]), ("flux", "torchao"), ("llama", "torchao")]:
        with torch.device("meta"):
            dense = MODELS[name]().num_parameters()
        assert qexp.load(folders[name], backend, device="cpu").num_parameters() == dense
