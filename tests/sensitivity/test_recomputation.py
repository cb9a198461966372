"""Blocks that are computed again in the backward pass: the same gradients, also of blocks that rest on disk."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qexp.config.offload import OffloadConfig
from qexp.offloading.strategies import apply_offload
from qexp.sensitivity.recomputation import recomputed
from tests.backends import CPU


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor, other: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return self.fc(x).tanh() * scale + other, other


def network() -> Any:
    torch.manual_seed(0)
    model: Any = nn.Module()
    model.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(x: Tensor) -> Tensor:
        other = x.sin()
        for block in model.blocks:
            x, other = block(x, other=other, scale=0.5)
        return x

    model.forward = forward
    return model.requires_grad_(False)


def gradients(model: Any, x: Tensor) -> list[Tensor]:
    """Those of the outputs of all layers, the last one first."""
    found: list[Tensor] = []

    def hook(layer: nn.Module, args: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(found.append)

    handles = [block.fc.register_forward_hook(hook) for block in model.blocks]
    with torch.enable_grad():
        model(x.requires_grad_()).square().sum().backward()
    for handle in handles:
        handle.remove()
    assert x.grad is not None
    return [*found, x.grad]


def test_gradients_are_those_of_a_network_that_keeps_everything() -> None:
    model, x = network(), torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    expected = gradients(model, x.clone())
    with recomputed(model, list(model.blocks)):
        found = gradients(model, x.clone())
    assert len(found) == 4 and all(torch.equal(*pair) for pair in zip(expected, found, strict=True))
    assert not any("forward" in vars(block) for block in model.blocks)


def test_weights_of_a_block_stay_until_its_gradients_are_there(tmp_path: Path) -> None:
    model, x = network(), torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    expected = gradients(model, x.clone())
    config = OffloadConfig("block", "disk").resolved("cpu")
    offload = apply_offload(model, config, device=CPU, block_lists=["blocks"], store=tmp_path)
    in_slots: list[bool] = []

    def look(block: Any) -> None:
        slots = [(slot.flat.data_ptr(), slot.flat.numel()) for slot in offload._engine.ring.slots]
        address = block.fc.weight.data_ptr()
        in_slots.append(any(start <= address < start + size for start, size in slots))

    def hook(block: Any) -> Any:
        def watch(layer: nn.Module, args: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(lambda _: look(block))

        return watch

    for block in model.blocks:
        block.fc.register_forward_hook(hook(block))
    with recomputed(model, list(model.blocks)):
        found = gradients(model, x.clone())
    assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True))
    assert in_slots == [True] * 3
    offload.remove()
