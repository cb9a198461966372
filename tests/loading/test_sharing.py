"""Modules under several names, and weights of several layers: one in memory and in the file, with the same outputs."""

import copy
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import qexp
from qexp.errors import LoadError
from qexp.offloading.payload import module_nbytes
from tests.loading.toys import prepare_toy, save_state, settings
from tests.products import diagonal, representatives

WIDTH = 256
BACKENDS = ["bitsandbytes", "bitsandbytes_int8", "torchao", "quanto", "gguf", "packed_uint4"]
OFFLOADED = BACKENDS[:4]


def linear(bias: bool = True) -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH, bias=bias)


class TwoParents(nn.Module):
    """A projection in two parents of different depth, each of which has layers of its own."""

    shared = True

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.ModuleDict({"proj": linear(), "own": linear()})
        inner = self.one["proj"] if self.shared else linear()
        self.two = nn.Sequential(nn.Sequential(linear(), inner), nn.LayerNorm(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one["own"](self.one["proj"](x)))


class TiedPerBias(nn.Module):
    """Three layers of one weight, each with a bias of its own or none, the last one under two names."""

    shared = True

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = linear(), linear(), linear(bias=False)
        self.d = self.c if self.shared else linear(bias=False)
        if self.shared:
            self.b.weight = self.c.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.c(self.b(self.a(x))))


class Recurrent(nn.Module):
    """A block with a buffer, applied three times under names of the list and one of its own."""

    steps: Tensor

    shared = True

    def __init__(self) -> None:
        super().__init__()
        self.block = Cell()
        self.layers = nn.ModuleList([self.block, linear(), self.block if self.shared else Cell()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.block, *self.layers):
            x = layer(x)
        return x


class Cell(nn.Module):
    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = linear(), linear(bias=False)
        self.register_buffer("shift", torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x))) * self.shift


NETWORKS: list[Any] = [TwoParents, TiedPerBias, Recurrent]


def apart_from(kind: Any) -> Any:
    """The network with copies in place of what it shares."""
    return type(kind.__name__, (kind,), {"shared": False})


def folders(kind: Any, tmp_path: Path) -> tuple[Path, Path]:
    """(the checkpoint of a network that shares, that of one with copies of the same weights)"""
    torch.manual_seed(0)
    model = kind().requires_grad_(False)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = {id(tensor): name for name, tensor in reversed(model.state_dict(keep_vars=True).items())}
    assert len(first) < len(state)
    return (
        save_state(tmp_path / "shared", {name: state[name] for name in first.values()}),
        save_state(tmp_path / "copies", state),
    )


def load(folder: Path, backend: str | None, build: Any, **options: Any) -> Any:
    return qexp.load(folder, backend, skeleton=build, device="cpu", compute_dtype="fp32", **options)


def distinct_weights(model: nn.Module) -> int:
    modules = [module for _, module in model.named_modules(remove_duplicate=False)]
    return len({id(module.weight) for module in modules if isinstance(module, nn.Linear)})


@pytest.mark.parametrize(("kind", "backend"), diagonal(NETWORKS, BACKENDS))
def test_what_is_shared_is_one_in_memory_and_in_the_file(kind: Any, backend: str, tmp_path: Path) -> None:
    folder, copies = folders(kind, tmp_path)
    model, apart = load(folder, backend, kind), load(copies, backend, apart_from(kind))
    x = torch.randn(4, WIDTH)
    expected, distinct = apart(x), distinct_weights(kind())
    assert distinct_weights(model) == distinct < distinct_weights(apart)
    assert module_nbytes(model) < module_nbytes(apart)
    assert torch.equal(model(x), expected) and torch.equal(model(x), expected)  # int8 moves its values on the first
    assert torch.equal(copy.deepcopy(model)(x), expected) and distinct_weights(copy.deepcopy(model)) == distinct

    qexp.save(model, tmp_path / "saved")
    names = [name for name in stored_names(tmp_path / "saved") if not name.endswith("put_scale")]  # a layer's own
    assert not any(name.startswith(("two.0.1.", "d.", "layers.0.", "layers.2.")) for name in names)
    assert not any(name.startswith(("b.weight", "b._weight", "b.SCB", "c.")) for name in names)
    again = load(tmp_path / "saved", None, kind)
    assert distinct_weights(again) == distinct and module_nbytes(again) == module_nbytes(model)
    assert torch.equal(again(x), expected)
    dense = again.dequantize()
    assert distinct_weights(dense) == distinct
    assert torch.equal(dense(x), apart.dequantize()(x))


def stored_names(folder: Path) -> list[str]:
    if (folder / "model.gguf").exists():
        from gguf import GGUFReader

        return [tensor.name for tensor in GGUFReader(folder / "model.gguf").tensors]
    with safe_open(folder / "diffusion_pytorch_model.safetensors", "pt") as file:
        return list(file.keys())


@pytest.mark.parametrize(
    ("kind", "backend", "strategy", "to"),
    representatives(
        product(NETWORKS, OFFLOADED, ["leaf", "model"], ["cpu", "disk"]),
        [
            (TwoParents, "bitsandbytes", "leaf", "cpu"),
            (TwoParents, "bitsandbytes_int8", "model", "disk"),
            (TiedPerBias, "torchao", "leaf", "disk"),
            (TiedPerBias, "quanto", "model", "cpu"),
            (Recurrent, "bitsandbytes_int8", "leaf", "cpu"),
            (Recurrent, "bitsandbytes", "model", "disk"),
        ],
    ),
)
def test_offload_of_what_is_shared_changes_nothing(
    kind: Any, backend: str, strategy: str, to: str, tmp_path: Path
) -> None:
    folder, _ = folders(kind, tmp_path)
    model, x = load(folder, backend, kind), torch.randn(4, WIDTH)
    expected = load(folder, backend, kind)(x)
    qexp.offload(model, strategy, device="cpu", to=to)
    assert torch.equal(model(x), expected) and torch.equal(model(x), expected)
    qexp.save(model, tmp_path / "saved")
    qexp.remove_offload(model)
    assert torch.equal(model(x), expected) and distinct_weights(model) == distinct_weights(kind())
    assert torch.equal(load(tmp_path / "saved", None, kind)(x), expected)


class TiedToEmbedding(nn.Module):
    """Two output layers that are the embedding, as in an encoder and decoder with one vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WIDTH, WIDTH)
        self.head, self.other = linear(), linear(bias=False)
        self.head.weight = self.other.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) + self.other(x) + self.embed.weight.sum()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_embedding_stays_dense_beside_the_quantized_layers_tied_to_it(backend: str, tmp_path: Path) -> None:
    folder, _ = folders(TiedToEmbedding, tmp_path)
    model, x = load(folder, backend, TiedToEmbedding), torch.randn(4, WIDTH)
    assert model.head.weight is model.other.weight is not model.embed.weight
    assert torch.equal(model.embed.weight, load(folder, None, TiedToEmbedding).embed.weight)
    qexp.save(model, tmp_path / "saved")
    again = load(tmp_path / "saved", None, TiedToEmbedding)
    assert again.head.weight is again.other.weight is not again.embed.weight
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize(
    ("kind", "patterns", "left"),
    [
        (TwoParents, ("one.proj", "two.0.1"), {"one.own", "two.0.0"}),
        (Recurrent, ("block", "layers.0.up", "layers.2.up"), {"layers.1"}),
        (TiedToEmbedding, ("head", "other"), set()),
    ],
)
def test_a_layer_skipped_under_one_name_is_skipped_under_all(
    kind: Any, patterns: tuple[str, ...], left: set[str], tmp_path: Path
) -> None:
    folder, _ = folders(kind, tmp_path)
    for pattern in patterns:
        checked = settings("bitsandbytes", skip_modules=(pattern,))
        if not left:
            with pytest.raises(LoadError, match=rf"every linear layer is skipped: .*its weight is that of '{pattern}'"):
                prepare_toy(folder, checked, kind)
            continue
        prepared = prepare_toy(folder, checked, kind)
        layers = {name for name in prepared.chosen if not name.endswith("down")}
        assert layers == left and any("its weight is that of" in why for why in prepared.plan.skipped.values())


@pytest.mark.parametrize("backend", ["bitsandbytes", "bitsandbytes_int8", "torchao", "quanto", "packed_uint4"])
def test_a_file_with_the_tensors_of_every_name_is_read(backend: str, tmp_path: Path) -> None:
    """As other programs write it, and this one did before."""
    folder, copies = folders(Recurrent, tmp_path)
    qexp.save(load(copies, backend, apart_from(Recurrent)), tmp_path / "saved")
    expected, x = load(folder, backend, Recurrent), torch.randn(4, WIDTH)
    assert torch.equal(load(tmp_path / "saved", None, Recurrent)(x), expected(x))


def test_a_file_without_any_name_of_a_shared_weight_is_refused(tmp_path: Path) -> None:
    folder, _ = folders(TiedPerBias, tmp_path)
    (folder / "model.safetensors").unlink()
    save_state(folder, {"a.bias": torch.zeros(WIDTH), "b.bias": torch.zeros(WIDTH)})
    with pytest.raises(LoadError, match=r"lacks 'a.weight', 'b.weight', 'c.weight', 'd.weight'"):
        load(folder, "bitsandbytes", TiedPerBias)
