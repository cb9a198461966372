"""Networks that read a layer's weight outside of the layer's own call, on every backend."""

import functools
import importlib
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import qexp
from qexp.errors import LoadError
from qexp.loading.weight_reads import _reads_of, weight_reads
from tests.backends import save_state
from tests.products import diagonal, representatives

BACKENDS = ["bitsandbytes", "bitsandbytes_int8", "torchao", "quanto", "gguf", "packed_uint4"]
WIDTH = 64


class FirstParameter(nn.Module):
    """As `ModelMixin.dtype` and many networks of users: the dtype of whatever parameter comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(torch.relu(self.inner(x.to(next(self.parameters()).dtype))))


def cast(x: Tensor, layer: Any) -> Tensor:
    return x.to(layer.weight.dtype)


class ByFunction(FirstParameter):
    """The read is in a function, which no module's code shows."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(torch.relu(self.inner(cast(x, self.inner))))


class InLoop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.relu(layer(x.to(layer.weight.dtype)))
        return x


class CastsItsLayer(FirstParameter):
    """As Switch's router, which it puts into fp32 in every forward."""

    def forward(self, x: Tensor) -> Tensor:
        self.inner = self.inner.to(torch.float32).float()
        return x + self.outer(torch.relu(self.inner(x.float())).to(x.dtype))


class Rescaled(InLoop):
    """As Rwkv, which divides weights in place before its first answer."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            layer.weight.div_(2.0**number)
        return self.plain(super().forward(x))


class Multiplied(nn.Module):
    """As Mamba's mixer on the way to its kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.steps, self.plain = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(x) + (self.steps.weight @ x.transpose(0, 1)).transpose(0, 1)


class Functional(nn.Module):
    """Through a local name, and an index."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
        self.plain = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        last = self.mlp[2]
        return self.plain(nn.functional.linear(self.mlp[:2](x), last.weight, last.bias))


class Encoder(nn.Module):
    """torch's own, which has a kernel that takes the layers' weights."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 128, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.zeros(2, 4, dtype=torch.bool)
        mask[1, 3] = True
        out: Tensor = self.encoder(x.view(2, 4, WIDTH), src_key_padding_mask=mask)
        return out.masked_fill(mask[..., None], 0)


def save(kind: type[nn.Module], folder: Path) -> nn.Module:
    torch.manual_seed(0)
    network = kind().eval().requires_grad_(False)
    save_state(folder, {name: value.bfloat16() for name, value in network.state_dict().items()})
    return network


KINDS: list[Any] = [FirstParameter, ByFunction, InLoop, Multiplied, Functional, Encoder]


@pytest.mark.parametrize(  # torch's kernel for an encoder fails on some formats alone
    ("kind", "backend"),
    representatives(product(KINDS, BACKENDS), [*zip(KINDS, BACKENDS, strict=True), *product([Encoder], BACKENDS[:-1])]),
)
def test_network_that_reads_a_weight_answers_nearly_as_the_dense_one(
    kind: type[nn.Module], backend: str, tmp_path: Path
) -> None:
    dense = save(kind, tmp_path)
    x = torch.randn(8, WIDTH)
    model = qexp.load(tmp_path, backend, skeleton=kind, device="cpu", compute_dtype="bf16")
    with torch.no_grad():
        got, want = model(x.bfloat16()).float(), dense(x)
    assert (got - want).norm() / want.norm() < 0.15  # of 4 bits 0.1; a cast to bytes gives 0.4 to 100


@pytest.mark.parametrize("backend", ["bitsandbytes", "bitsandbytes_int8", "torchao", "gguf"])  # the others refuse it
def test_layer_that_its_network_casts_answers_nearly_as_the_dense_one(backend: str, tmp_path: Path) -> None:
    dense, x = save(CastsItsLayer, tmp_path), torch.randn(8, WIDTH)
    model = qexp.load(tmp_path, backend, skeleton=CastsItsLayer, device="cpu", compute_dtype="bf16")
    for _ in range(2):
        with torch.no_grad():
            got, want = model(x.bfloat16()).float(), dense(x)
        assert (got - want).norm() / want.norm() < 0.15


@pytest.mark.parametrize(("kind", "backend"), diagonal([FirstParameter, InLoop, Encoder], BACKENDS))
def test_weight_shows_the_compute_dtype_and_is_quantized(kind: type[nn.Module], backend: str, tmp_path: Path) -> None:
    dense_numel = sum(parameter.numel() for parameter in save(kind, tmp_path).parameters())
    for dtype in (torch.bfloat16, torch.float32):
        model = qexp.load(tmp_path, backend, skeleton=kind, device="cpu", compute_dtype=dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        assert qexp.memory_footprint(model) < dense_numel * dtype.itemsize


@pytest.mark.parametrize(("kind", "layer"), [(Multiplied, "steps"), (Functional, "mlp.2"), (Rescaled, "layers.1")])
def test_layer_whose_weight_is_computed_with_is_skipped_with_its_reason(
    kind: type[nn.Module], layer: str, tmp_path: Path
) -> None:
    save(kind, tmp_path)
    model: Any = qexp.load(tmp_path, "torchao", skeleton=kind, device="cpu")
    assert type(model.get_submodule(layer).weight) is nn.Parameter
    assert [read.what for read in weight_reads(model)[layer]] == ["value"]
    assert type(model.plain.weight.data) is not Tensor


def test_stored_weight_that_is_computed_with_is_refused(tmp_path: Path) -> None:
    class Plain(Multiplied):
        def forward(self, x: Tensor) -> Tensor:
            return self.steps(x)

    save(Plain, tmp_path / "dense")
    model = qexp.load(tmp_path / "dense", "bitsandbytes", skeleton=Plain, device="cpu")
    qexp.save(model, tmp_path / "saved")
    with pytest.raises(LoadError, match=r"'steps' is stored quantized, but Multiplied computes with its weight itself"):
        qexp.load(tmp_path / "saved", skeleton=Multiplied, device="cpu")


def test_saved_bytes_are_the_librarys_uint8(tmp_path: Path) -> None:
    save(InLoop, tmp_path)
    model = qexp.load(tmp_path, "bitsandbytes", skeleton=InLoop, device="cpu")
    qexp.save(model, tmp_path / "saved")
    stored = load_file(tmp_path / "saved" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for name, value in stored.items() if name.endswith("weight")} == {torch.uint8}
    again = qexp.load(tmp_path / "saved", skeleton=InLoop, device="cpu")
    x = torch.randn(2, WIDTH, dtype=torch.bfloat16)
    assert torch.equal(again(x), model(x))


def test_matrices_of_loras_are_never_quantized(tmp_path: Path) -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_layer = nn.Linear(WIDTH, WIDTH)
            self.lora_A = nn.ModuleDict({"default": nn.Linear(WIDTH, 32, bias=False)})
            self.lora_B = nn.ModuleDict({"default": nn.Linear(32, WIDTH, bias=False)})

        def forward(self, x: Tensor) -> Tensor:
            return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = Wrapper(), Wrapper()

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x))

    save(Net, tmp_path)
    model: Any = qexp.load(tmp_path, "torchao", skeleton=Net, device="cpu", skip_modules=["last"])
    dense = {name for name, p in model.named_parameters() if type(p) is nn.Parameter and type(p.data) is Tensor}
    quantized = {name for name, _ in model.named_parameters()} - dense
    assert quantized == {"first.base_layer.weight"}


class Harmless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        nn.init.zeros_(self.fc.weight)

    def fuse_projections(self) -> Tensor:
        return torch.cat([self.fc.weight])

    def forward(self, x: Tensor) -> Tensor:
        if self.fc.weight is not None and isinstance(self.fc.weight, Tensor):
            x = x.to(self.fc.weight.device)
        return self.fc(x)


def logged(method: Any) -> Any:
    @functools.wraps(method)
    def call(*arguments: Any) -> Any:
        return method(*arguments)

    return call


def unnamed(method: Any) -> Any:
    return lambda *arguments: method(*arguments)


class WrapsAnothersMethod(FirstParameter):
    """As `ModelMixin.to`; its code stands in the class, that of the other method does not count."""

    @functools.wraps(nn.Module.float)
    def float(self) -> Any:
        return self.inner.weight.sum()


class IsWrapped(FirstParameter):
    @logged
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.inner.weight


class IsHidden(FirstParameter):
    @unnamed
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.inner.weight


class IsProperty(FirstParameter):
    @functools.cached_property
    def product(self) -> Tensor:
        return self.inner.weight @ self.outer.weight


class OnlySets(FirstParameter):
    def set_weights(self) -> None:
        self.inner.weight @ self.outer.weight


@pytest.mark.parametrize("kind", [WrapsAnothersMethod, IsWrapped, IsHidden, IsProperty, OnlySets])
def test_reads_are_found_whatever_wraps_a_method_that_runs(kind: type[nn.Module]) -> None:
    paths = {read.path for read in _reads_of(kind)}
    assert paths == ({("inner",), ("outer",)} if kind is IsProperty else set() if kind is OnlySets else {("inner",)})


def test_reads_that_any_tensor_answers_do_not_count() -> None:
    assert _reads_of(Harmless) == ()


@pytest.mark.parametrize(
    ("module", "kind", "reads"),
    [
        ("t5.modeling_t5", "T5DenseGatedActDense", {("dtype", ("wo",))}),
        ("mamba.modeling_mamba", "MambaMixer", {("value", ("dt_proj",)), ("value", ("out_proj",))}),
        ("reformer.modeling_reformer", "LSHSelfAttention", {("value", ("query_key",)), ("value", ("value",))}),
    ],
)
def test_reads_of_published_networks_are_found(module: str, kind: str, reads: set[Any]) -> None:
    found = _reads_of(getattr(importlib.import_module(f"transformers.models.{module}"), kind))
    assert {(read.what, read.path) for read in found} >= reads
