"""A quantized weight is not changed in place, by any backend: an error in place of no effect, or of other numbers."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qexp
from qexp.errors import ConfigError
from tests.loading.toys import save_state

BACKENDS = [
    "bitsandbytes", "bitsandbytes_int8", "torchao", "torchao_float8wo", "quanto", "quanto_int4", "gguf", "packed_uint4",
]  # fmt: skip
WIDTH = 256


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def delta() -> Tensor:
    return torch.full((WIDTH, WIDTH), 0.5)


def add_to_data(weight: Any) -> None:
    weight.data += delta()


def scale_data(weight: Any) -> None:
    weight.data *= 2


def set_row(weight: Any) -> None:
    weight[3] = 0


def set_data(weight: Any) -> None:
    weight.data = delta()


OPERATIONS: dict[str, Callable[[Any], object]] = {
    "add to data": add_to_data,
    "scale data": scale_data,
    "set a row": set_row,
    "set data": set_data,
    "add_": lambda weight: weight.add_(delta()),
    "sub_ of a number": lambda weight: weight.sub_(1),
    "lerp_": lambda weight: weight.lerp_(delta(), 0.5),
    "copy_": lambda weight: weight.copy_(delta()),
    "copy_ into data": lambda weight: weight.data.copy_(delta()),
    "zero_": lambda weight: weight.data.zero_(),
    "out": lambda weight: torch.add(delta(), 1, out=weight),
    "initialize": lambda weight: nn.init.normal_(weight),
    "several": lambda weight: torch._foreach_mul_([weight], 2.0),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return save_state(tmp_path_factory.mktemp("net"), dict(Net().state_dict()))


def load(folder: Path, backend: str) -> Any:
    return qexp.load(folder, backend, skeleton=Net, device="cpu", compute_dtype="fp32")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_change_in_place_is_refused_and_changes_nothing(backend: str, folder: Path) -> None:
    model, x = load(folder, backend), torch.randn(3, WIDTH)
    expected = model(x)
    for name, operation in OPERATIONS.items():
        with torch.no_grad(), pytest.raises(ConfigError, match=r"on a quantized weight .* model\.dequantize\(\) first"):
            operation(model.fc.weight)
            raise AssertionError(name)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_reads_moves_and_copies_a_weight_still_works(backend: str, folder: Path) -> None:
    model, x = load(folder, backend), torch.randn(3, WIDTH)
    expected = model(x)
    model.fc.weight.requires_grad_(False)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    if backend != "torchao_float8wo":  # torch 2.13 cannot pickle float8
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    assert torch.equal(model.to("cpu")(x), expected)
    qexp.offload(model, "leaf", device="cpu", to="cpu")
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("backend", ["bitsandbytes", "bitsandbytes_int8"])
def test_dense_weights_of_the_librarys_own_classes_are_changed_until_they_are_quantized(
    backend: str, folder: Path
) -> None:
    import bitsandbytes

    load(folder, backend)  # from now on the class refuses
    kind: Any = bitsandbytes.nn.Params4bit if backend == "bitsandbytes" else bitsandbytes.nn.Int8Params
    weight = kind(torch.ones(64, 64), requires_grad=False)
    weight.data += 1
    weight.mul_(2)
    assert torch.equal(torch.Tensor(weight.data), torch.full((64, 64), 4.0))
    weight.data = torch.zeros(32, 64)
    assert weight.shape == (32, 64)


def test_a_lora_is_fused_where_peft_quantizes_anew_and_refused_elsewhere(tmp_path: Path) -> None:
    from diffusers import SanaTransformer2DModel

    torch.manual_seed(0)
    shape: Any = {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 1, "cross_attention_dim": 64}
    more = {"num_cross_attention_heads": 2, "cross_attention_head_dim": 32, "caption_channels": 64, "sample_size": 4}
    SanaTransformer2DModel(in_channels=4, out_channels=4, **shape, **more).save_pretrained(tmp_path)
    layer = "transformer_blocks.0.attn1.to_q"
    matrices = {"lora_A": torch.randn(4, 64), "lora_B": torch.randn(64, 4)}
    lora = {f"transformer.{layer}.{name}.weight": matrix for name, matrix in matrices.items()}
    inputs = {
        "hidden_states": torch.randn(1, 4, 4, 4), "encoder_hidden_states": torch.randn(1, 3, 64),
        "timestep": torch.tensor([5]), "return_dict": False,
    }  # fmt: skip
    for backend in ("bitsandbytes_int8", "torchao", "quanto", "bitsandbytes"):
        model: Any = qexp.load(tmp_path, backend, device="cpu", compute_dtype="fp32")
        model.load_lora_adapter(dict(lora))
        expected = model(**inputs)[0]
        if backend == "quanto":
            with pytest.raises(ConfigError, match="on a quantized weight"):
                model.fuse_lora()
            continue
        model.fuse_lora()
        error = (model(**inputs)[0] - expected).norm() / expected.norm()
        assert 0 < error < 0.3  # quantized once more; without the LoRA it is 1
