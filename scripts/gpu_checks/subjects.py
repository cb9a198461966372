"""The models under test: a small one that every backend loads from a checkpoint, and a large one that is timed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

BF16 = torch.bfloat16
Forward = Callable[[nn.Module], Tensor]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.gate = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate * self.fc2(nn.functional.gelu(self.fc1(self.norm(x))))


class Net(nn.Module):
    """Blocks, layers outside blocks, and a parameter and a buffer of the model itself."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, width)
        self.scale = nn.Parameter(torch.ones(width))
        self.register_buffer("shift", torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) * self.scale + self.shift
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def save_net(folder: Path, width: int, depth: int) -> int:
    """Write a seeded `Net` in bf16 as a checkpoint; returns its bytes."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=True):
        skeleton = Net(width, depth).state_dict()
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, meta in skeleton.items():
        noise = torch.randn(meta.shape, generator=generator)
        around_one = name.endswith(("norm.weight", "gate", "scale"))
        tensors[name] = (noise * width**-0.5 if meta.dim() == 2 else around_one + 0.02 * noise).to(BF16)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"width": width, "depth": depth}), encoding="utf-8")
    return sum(tensor.nbytes for tensor in tensors.values())


def load_net(option: str, folder: Path, device: torch.device | str, dtype: torch.dtype, *, workers: int = 2) -> Any:
    """Return the `LoadedComponent` of a saved `Net`, as `python -m qexp backend=<option>` would load it."""
    from qexp.config.schema import ComponentConfig, LoaderConfig
    from qexp.doctor.options import backend_config, backend_files
    from qexp.loading.lifecycle import load_component
    from qexp.models.folder import FolderSource

    (path,) = backend_files([option])
    settings = ComponentConfig(backend_config(path), compute_dtype=str(dtype).removeprefix("torch."))
    source = FolderSource(folder, lambda config: Net(config["width"], config["depth"]))
    loader = LoaderConfig(workers=workers)
    return load_component(source, "model", settings, device=torch.device(device), loader=loader)


def batches(width: int, count: int, dtype: torch.dtype) -> list[Tensor]:
    """Different inputs [32, width], some columns above the outlier threshold of LLM.int8."""
    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(32, width, generator=generator) for _ in range(count)]
    for batch in made:
        batch[:, 3] *= 20
    return [batch.to(dtype) for batch in made]


@dataclass
class Timed:
    """A model to time. `make()` gives a new one around the same weights, which rest in host memory."""

    name: str
    weights: dict[str, Tensor]
    skeleton: Callable[[], nn.Module]  # on meta
    inputs: dict[str, Tensor]  # keyword arguments of its forward, on the host
    block_lists: list[str]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.weights.values())

    def make(self) -> nn.Module:
        model = self.skeleton()
        model.load_state_dict(self.weights, assign=True)
        return model.eval().requires_grad_(False)


def timed_model(*, small: bool, gib: float, device: torch.device, dtype: torch.dtype) -> Timed:
    """A transformer of FLUX's shape, or without diffusers a stack of blocks, with made weights of about `gib` GiB."""
    try:
        import diffusers.models  # noqa: F401
    except ImportError:
        return _stack(small=small, gib=gib, device=device, dtype=dtype)
    return _flux(small=small, gib=gib, device=device, dtype=dtype)


def _flux(*, small: bool, gib: float, device: torch.device, dtype: torch.dtype) -> Timed:
    """Twice as many single blocks as double ones, as FLUX.1 has; 24 heads of 128 in all of them."""
    from accelerate import init_empty_weights
    from diffusers import FluxTransformer2DModel
    from diffusers.utils import logging

    logging.set_verbosity_error()  # each skeleton would be warned of its cast
    heads, head_dim, tokens, text_tokens = (2, 16, 16, 8) if small else (24, 128, 4096, 512)
    width = heads * head_dim
    pair_bytes = (36 + 2 * 15) * width**2 * dtype.itemsize  # a double block has 36 width² weights, a single one 15
    pairs = 2 if small else max(round(gib * 2**30 / pair_bytes), 1)
    text_dim, pooled_dim = (32, 16) if small else (4096, 768)
    config: dict[str, Any] = {
        "num_layers": pairs,
        "num_single_layers": 2 * pairs,
        "attention_head_dim": head_dim,
        "num_attention_heads": heads,
        "joint_attention_dim": text_dim,
        "pooled_projection_dim": pooled_dim,
        "in_channels": 16 if small else 64,
        "axes_dims_rope": (4, 6, 6) if small else (16, 56, 56),
    }

    def skeleton() -> nn.Module:
        with init_empty_weights():
            model: nn.Module = FluxTransformer2DModel(**config).to(dtype)
        return model

    generator = torch.Generator().manual_seed(1)

    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    inputs = {
        "hidden_states": made(1, tokens, config["in_channels"]),
        "encoder_hidden_states": made(1, text_tokens, text_dim),
        "pooled_projections": made(1, pooled_dim),
        "timestep": torch.tensor([0.5]).to(dtype),
        "img_ids": torch.arange(tokens * 3).view(tokens, 3).remainder(64).to(dtype),
        "txt_ids": torch.zeros(text_tokens, 3, dtype=dtype),
    }
    weights = made_weights(skeleton(), device)
    return Timed(
        "FluxTransformer2DModel", weights, skeleton, inputs, ["transformer_blocks", "single_transformer_blocks"]
    )


def _stack(*, small: bool, gib: float, device: torch.device, dtype: torch.dtype) -> Timed:
    from accelerate import init_empty_weights

    width = 64 if small else 4096
    depth = 4 if small else max(round(gib * 2**30 / (8 * width**2 * dtype.itemsize)), 1)

    def skeleton() -> nn.Module:
        with init_empty_weights(include_buffers=True):
            return Net(width, depth).to(dtype)

    inputs = {"x": batches(width, 1, dtype)[0].repeat(1 if small else 128, 1)}
    return Timed("stack of blocks", made_weights(skeleton(), device), skeleton, inputs, ["blocks"])


def made_weights(skeleton: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """Weights for a model on meta that keep its activations in range; made on the device, which is faster."""
    torch.manual_seed(0)
    made = {}
    for name, meta in skeleton.state_dict().items():
        tensor = torch.empty(meta.shape, dtype=meta.dtype, device=device)
        value = 0.0 if name.endswith("bias") else 1.0
        made[name] = (tensor.normal_(std=0.02) if meta.dim() > 1 else tensor.fill_(value)).cpu()
    return made


def forward_of(timed: Timed, device: torch.device) -> Forward:
    """Return one forward pass of the model with its inputs on the device; gives its output tensor."""
    inputs = {name: tensor.to(device) for name, tensor in timed.inputs.items()}

    def forward(model: nn.Module) -> Tensor:
        with torch.no_grad():
            output: Any = model(**inputs)
        return output if isinstance(output, Tensor) else output[0]

    return forward
