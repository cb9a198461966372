"""Small models with everything a checkpoint can hold, saved as checkpoints, and their model source."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qexp.config.schema import ComponentConfig, LoaderConfig
from qexp.loading.component import LoadedComponent, Prepared
from qexp.loading.lifecycle import load_component, request_load
from qexp.loading.prepare import load_quantizer_of, prepare
from qexp.models.base import ModelSource
from tests.backends import CPU, backend_config
from tests.backends import save_state as save_state

WIDTH = 256  # what the widest block of any format divides


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.fc1 = nn.Linear(WIDTH, 2 * WIDTH)
        self.fc2 = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm(x))))


class Toy(nn.Module):
    """Linear layers at several depths, a parameter of the model itself, and buffers of every kind."""

    position: Tensor
    shift: Tensor
    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, 10)
        self.scale = nn.Parameter(torch.randn(()))
        self.register_buffer("shift", torch.randn(WIDTH))
        self.register_buffer("steps", torch.arange(5))
        self.register_buffer("position", torch.linspace(0, 1, WIDTH), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) * self.scale + self.shift.to(x.dtype) + self.position.to(x.dtype)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class ToySource(ModelSource):
    """The model source of one component, `toy`, which `build` constructs."""

    def __init__(self, path: Path, build: Callable[[], nn.Module]) -> None:
        self.path, self.build = path, build

    def checkpoints(self) -> dict[str, Path]:
        return {"toy": self.path}

    def skeleton(self, component: str, config: dict[str, Any]) -> nn.Module:
        return self.build()


def random_state(build: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The state dict of a model with N(0, 1) parameters, floating-point values in `dtype`; tied names share memory."""
    torch.manual_seed(0)
    model = build().requires_grad_(False)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return dict(model.to(dtype).state_dict())


def settings(backend: str = "torchao", *overrides: str, **fields: Any) -> ComponentConfig:
    return ComponentConfig(backend_config(backend, *overrides), **fields)


def prepare_toy(folder: Path, settings: ComponentConfig, build: Callable[[], nn.Module] = Toy) -> Prepared:
    request = request_load(ToySource(folder, build), "toy", settings, device=CPU)
    prepared = prepare(request, load_quantizer_of(request))
    prepared.check_patterns()
    return prepared


def load_toy(
    folder: Path, settings: ComponentConfig, build: Callable[[], nn.Module] = Toy, *, workers: int = 2, **options: Any
) -> LoadedComponent:
    """`options` are further ones of `load_component`."""
    source, loader = ToySource(folder, build), LoaderConfig(in_flight_mib=1, workers=workers)
    return load_component(source, "toy", settings, **{"device": CPU, "loader": loader} | options)


def load_in_bf16(folder: Path, backend: str) -> Any:
    return load_toy(folder, settings(backend, compute_dtype="bfloat16")).model


def answer_of(model: Any) -> Tensor:
    """Its output for a seeded input in bf16, [3, 10]."""
    with torch.no_grad():
        output: Tensor = model(torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16))
    return output
