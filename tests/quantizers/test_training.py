"""Training of what is not quantized: the weights stay as they are, and gradients flow through them to adapters."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qexp.offloading.payload import leaves
from tests.backends import QUANTIZING, REPRESENTATIVES, same_bytes
from tests.loading.toys import WIDTH, Toy, load_toy, random_state, save_state, settings
from tests.products import representatives

RANK = 4


class LoRA(nn.Module):
    """y = layer(x) + B A x, with A and B to be trained. Source: arXiv:2106.09685."""

    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = layer
        generator = torch.Generator().manual_seed(2)
        self.a = nn.Parameter((torch.randn(RANK, layer.in_features, generator=generator) * 0.05).to(dtype))
        self.b = nn.Parameter(torch.zeros(layer.out_features, RANK, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x) + x @ self.a.T @ self.b.T
        return output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    state = {name: tensor * 0.05 if tensor.dim() > 1 else tensor for name, tensor in random_state(Toy).items()}
    return save_state(tmp_path_factory.mktemp("toy"), state)


def with_adapters(folder: Path, backend: str, dtype: torch.dtype) -> Any:
    model: Any = load_toy(folder, settings(backend, compute_dtype=str(dtype).removeprefix("torch."))).model
    for block in model.blocks:
        block.fc1, block.fc2 = LoRA(block.fc1, dtype), LoRA(block.fc2, dtype)
    return model


def gradients(model: Any, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss = model(x).float().square().mean()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return loss.detach(), dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


@pytest.mark.parametrize(
    ("backend", "dtype"),
    representatives(
        product(QUANTIZING, [torch.float32, torch.bfloat16]),
        [(name, (torch.float32, torch.bfloat16)[number % 2]) for number, name in enumerate(REPRESENTATIVES[1:])],
    ),
    ids=str,
)
def test_training(backend: str, dtype: torch.dtype, folder: Path) -> None:
    """Gradients are those of the dequantized model, the loss falls, and no quantized byte changes."""
    model, x = with_adapters(folder, backend, dtype), torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(1))
    x = x.to(dtype)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 8
    with torch.no_grad():
        for parameter in trained[1::2]:  # B; from zero, A would get no gradient
            parameter.normal_(std=0.02, generator=torch.Generator().manual_seed(3))
    model.train()
    first, found = gradients(model, x)  # LLM.int8 hands its scales over now
    before = [
        leaf.clone() for parameter in model.parameters() if not parameter.requires_grad for leaf in leaves(parameter)
    ]
    optimizer = torch.optim.SGD(trained, lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).float().square().mean().backward()
        optimizer.step()
    last, _ = gradients(model, x)
    assert last < first
    after = [leaf for parameter in model.parameters() if not parameter.requires_grad for leaf in leaves(parameter)]
    assert all(same_bytes(a, b) for a, b in zip(before, after, strict=True))
    again = with_adapters(folder, backend, dtype)
    with torch.no_grad():
        for parameter in [p for p in again.parameters() if p.requires_grad][1::2]:
            parameter.normal_(std=0.02, generator=torch.Generator().manual_seed(3))
    _, expected = gradients(again.dequantize(), x)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        error = (gradient.float() - expected[name].float()).norm() / expected[name].float().norm()
        assert gradient.isfinite().all() and error < 0.06, (name, float(error))
