"""What the tests of several rooms share: every backend that `conf/backend` has, and a checkpoint of linear layers."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from safetensors.torch import save_file
from torch import Tensor, nn

from qexp.config.backend_options import backend_of
from qexp.config.yaml_options import option_names
from qexp.errors import ConfigError
from qexp.models.base import ModelSource
from qexp.quantizers.base import Quantizer
from qexp.quantizers.rows import WeightSpec
from tests.products import representatives

# not mixed, whose recipes name layers
BACKENDS = [name for name in option_names("backend") if backend_of(name).missing() is None]
QUANTIZING = [name for name in BACKENDS if name != "none"]
CPU = torch.device("cpu")
# One option for each way to hold bytes: none; attributes beside the data, nested ones too; the module's own state; a
# flat subclass; a subclass in a subclass; blocks of bytes; packed codes. The other options differ from one of these
# only in their codes, which have tests of their own.
REPRESENTATIVES = ("none", "bitsandbytes_nf4_dq", "bitsandbytes_int8", "torchao", "quanto_int4", "gguf", "packed_uint4")
EVERY_WAY = representatives(BACKENDS, REPRESENTATIVES)
EVERY_WAY_TO_QUANTIZE = representatives(QUANTIZING, REPRESENTATIVES[1:])


@cache
def backend_config(name: str, *overrides: str) -> Any:
    """The config of `backend=<name> backend.<override> …`, without composing everything else, which takes twenty times
    as long. tests/api/test_models.py compares it with what the command line composes."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    return backend_of(name, {str(one.key_or_group): one.value() for one in parsed})


class Stack(nn.Module):
    """Linear layers one after the other, `layers.0`, `layers.1`, …"""

    def __init__(self, shapes: list[tuple[int, int]], bias: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(columns, rows, bias=bias) for rows, columns in shapes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class StackSource(ModelSource):
    """The model source of a saved `Stack`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def checkpoints(self) -> dict[str, Path]:
        return {"stack": self.folder}

    def skeleton(self, component: str, config: dict[str, Any]) -> nn.Module:
        return Stack([tuple(shape) for shape in config["shapes"]], config["bias"])


def save_state(folder: Path, state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> Path:
    """A checkpoint of one file, and its config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(state), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(dict(config or {})))
    return folder


def save_stack(folder: Path, shapes: list[tuple[int, int]], *, dtype: torch.dtype, bias: bool = True) -> Stack:
    """A stack with N(0, 1) weights, saved as a checkpoint."""
    torch.manual_seed(0)
    model = Stack(shapes, bias)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    model = model.to(dtype).requires_grad_(False)
    save_state(folder, model.state_dict(), {"shapes": shapes, "bias": bias})
    return model


def save_alike(folder: Path, shape: tuple[int, int], count: int, dtype: torch.dtype) -> list[tuple[int, int]]:
    """Save the checkpoint of a stack of layers with one weight, N(0, 1), and return its shapes.

    For what takes much memory: as many different weights would take longer to draw than to load.
    """
    torch.manual_seed(0)
    weight = torch.randn(shape).to(dtype)
    state = {f"layers.{number}.weight": weight.clone() for number in range(count)}
    save_state(folder, state, {"shapes": [shape] * count, "bias": False})
    return [shape] * count


def save_digits(folder: Path, depth: int = 1) -> Path:
    """A digits model with random weights."""
    from qexp.models.digits_network import DigitsConfig, DigitsTransformer

    torch.manual_seed(0)
    shape = DigitsConfig(depth=depth)
    config = {"_class_name": "DigitsTransformer", **asdict(shape)}
    return save_state(folder, DigitsTransformer(shape).bfloat16().state_dict(), config)


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same, bit by bit: packed weights may be held in a dtype in which some are NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b)))


def can_hold(quantizer: Quantizer, spec: WeightSpec) -> bool:
    """Whether the format can hold a weight of this shape: not, say, one that its groups do not divide."""
    try:
        return quantizer.reason_to_skip(spec) is None
    except ConfigError:
        return False
