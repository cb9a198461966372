"""Subclasses of `nn.Linear` that compute the same are quantized as one, by what their source says; others are not."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

import qexp
from qexp.errors import ConfigError
from qexp.quantizers.linear_forward import is_linear_forward
from tests.products import representatives


class Falcon(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        hidden_states = input @ self.weight.T
        if self.bias is None:
            return hidden_states
        return hidden_states + self.bias


class Functional(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        """As the base."""
        return F.linear(x, self.weight, self.bias)


class Named(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.weight, bias=self.bias)


class Matmul(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.matmul(x, self.weight.t())
        if self.bias is not None:
            y += self.bias
        return y


class Transposed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight.transpose(0, 1)
        out = x @ w
        if self.bias is not None:
            out = torch.add(self.bias, out)
        else:
            return out
        return out


class Inherited(Falcon):
    def extra_repr(self) -> str:
        return "the same"


class WithoutBias(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) * 2


class Cast(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return F.linear(x, self.weight, self.bias)


class Untransposed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


class TwoInputs(nn.Linear):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:  # type: ignore[override]
        return F.linear(x, self.weight, self.bias)


class Looped(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = F.linear(x, self.weight, self.bias)
        return x


class Router(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias).softmax(-1)


class Other(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return OTHER.linear(x, self.weight, self.bias)


class OTHER:
    @staticmethod
    def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x, weight.abs(), bias)


class Property(Functional):
    @property
    def bias(self) -> Any:  # type: ignore[override]
        return None


SAME = [Falcon, Functional, Named, Matmul, Transposed, Inherited]
OTHERS = [WithoutBias, Scaled, Cast, Untransposed, TwoInputs, Looped, Router, Other, Property]


@pytest.mark.parametrize("kind", SAME)
def test_class_that_computes_the_same_is_linear(kind: type[nn.Linear]) -> None:
    assert is_linear_forward(kind)
    for bias in (True, False):
        layer, x = kind(4, 3, bias=bias), torch.randn(2, 4)
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("kind", OTHERS)
def test_class_that_computes_otherwise_is_not(kind: type[nn.Linear]) -> None:
    assert not is_linear_forward(kind)


def test_class_of_no_file_is_not() -> None:
    made: dict[str, Any] = {"nn": nn, "F": F}
    exec("class Made(nn.Linear):\n    def forward(self, x):\n        return F.linear(x, self.weight, self.bias)", made)
    assert not is_linear_forward(made["Made"])


@pytest.mark.exhaustive
def test_classes_of_transformers_are_told_apart() -> None:
    from transformers.models.falcon.modeling_falcon import FalconLinear
    from transformers.models.llama4.modeling_llama4 import Llama4Router

    assert is_linear_forward(FalconLinear)
    assert not is_linear_forward(Llama4Router)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Falcon(64, 64), Matmul(64, 64, bias=False)
        self.kept = Scaled(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.kept(self.second(self.first(x)))


@pytest.mark.parametrize("backend", ["bitsandbytes", "bitsandbytes_int8", "torchao", "quanto", "gguf", "packed_uint4"])
def test_equivalent_layers_are_quantized_with_every_backend(backend: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Net().requires_grad_(False)
    save_file(net.state_dict(), tmp_path / "m.safetensors")
    model: Any = qexp.load(tmp_path / "m.safetensors", backend, skeleton=lambda config: Net(), device="cpu")
    assert [type(layer) for layer in (model.first, model.second)] != [Falcon, Matmul] and type(model.kept) is Scaled
    x = torch.randn(5, 64)
    error = (model(x) - net(x)).norm() / net(x).norm()
    assert 0 < float(error) < 0.25
    dense = model.dequantize()
    torch.testing.assert_close(dense(x), model(x))


class Narrow(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(64, 64), nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(x).sum() + self.narrow(torch.ones(3, self.narrow.in_features)).sum()


SIZED = ["bitsandbytes", "bitsandbytes_int8", "torchao", "quanto", "gguf", "packed_uint4"]
SIZES = [(0, 64), (64, 0), (0, 0), (1, 64), (64, 1), (1, 1)]


@pytest.mark.parametrize(
    ("size", "backend"),
    representatives(
        product(SIZES, SIZED),
        [
            (size, backend)
            for number, backend in enumerate(
                ["bitsandbytes", "bitsandbytes_int8", "torchao", "quanto", "gguf", "packed_uint4"]
            )
            for size in (SIZES[number], SIZES[(number + 3) % 6])
        ],
    ),
)
def test_layer_of_no_or_one_feature_is_loaded_or_refused_with_a_remedy(
    backend: str, size: tuple[int, int], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    net = Narrow(*size).requires_grad_(False)
    save_file(net.state_dict(), tmp_path / "m.safetensors")
    try:
        model: Any = qexp.load(tmp_path / "m.safetensors", backend, skeleton=lambda config: Narrow(*size), device="cpu")
    except ConfigError as error:  # torchao's scales and groups of 64 need more than one input
        assert size[1] == 64 or backend == "packed_uint4"
        assert size[0] == 1 and "add the layer to skip_modules" in str(error)
        return
    x = torch.randn(2, 64)
    if 0 in size:
        assert type(model.narrow) is nn.Linear
    wanted = net.wide(x).sum() + net.narrow(torch.ones(3, size[0])).sum()
    torch.testing.assert_close(model(x), wanted, rtol=0.3, atol=3.0)
    qexp.save(model, tmp_path / "saved")
