"""A small model with everything that offloading meets, quantized by each library directly, or as a load does it."""

import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qexp.config.backend_options import backend_of
from qexp.config.schema import ComponentConfig, LoaderConfig
from qexp.config.yaml_options import option_names
from qexp.doctor.options import backend_config, backend_files
from qexp.loading.lifecycle import load_component
from qexp.models.folder import FolderSource
from tests.backends import save_state

WIDTH = 64


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.fc1 = nn.Linear(WIDTH, 2 * WIDTH)
        self.fc2 = nn.Linear(2 * WIDTH, WIDTH)
        self.gate = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate * self.fc2(nn.functional.gelu(self.fc1(self.norm(x))))


class Net(nn.Module):
    """Blocks, modules outside blocks, and a parameter and a buffer of the model itself."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.head = nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.randn(WIDTH))
        self.register_buffer("shift", torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) * self.scale + self.shift
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def replace_linears(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> None:
    for name, child in list(model.named_children()):
        if type(child) is nn.Linear:
            setattr(model, name, make(child))
        else:
            replace_linears(child, make)


def _torchao(config: Callable[[Any], Any]) -> Callable[[nn.Module], None]:
    def quantize(model: nn.Module) -> None:
        import torchao.quantization as ao

        ao.quantize_(model, config(ao))

    return quantize


def _quanto(weights: str) -> Callable[[nn.Module], None]:
    def quantize(model: nn.Module) -> None:
        from qexp.quantizers.quanto_support.library import library

        quanto = library()  # without the C++ extension that the library would compile
        quanto.quantize(model, weights=getattr(quanto, weights))
        quanto.freeze(model)

    return quantize


def _four_bit(quant_type: str, *, nested: bool = False, repack: bool = False) -> Callable[[nn.Module], None]:
    """repack: let the module repack its weight on its first forward, as it does on a CPU with AVX512-BF16."""

    def quantize(model: nn.Module) -> None:
        import bitsandbytes as bnb

        def make(old: nn.Linear) -> nn.Module:
            new = bnb.nn.Linear4bit(
                old.in_features, old.out_features, quant_type=quant_type, compress_statistics=nested
            )
            new.weight = bnb.nn.Params4bit(
                old.weight.data, requires_grad=False, quant_type=quant_type, compress_statistics=nested, module=new
            )
            new.bias = old.bias
            new.support_avx512bf16_for_cpu = repack
            return new.to("cpu")

        replace_linears(model, make)

    return quantize


def _eight_bit(threshold: float) -> Callable[[nn.Module], None]:
    def quantize(model: nn.Module) -> None:
        import bitsandbytes as bnb

        def make(old: nn.Linear) -> nn.Module:
            new = bnb.nn.Linear8bitLt(old.in_features, old.out_features, has_fp16_weights=False, threshold=threshold)
            new.weight = bnb.nn.Int8Params(old.weight.data, requires_grad=False, has_fp16_weights=False)
            new.bias = old.bias
            return new.to("cpu")

        replace_linears(model, make)

    return quantize


def _gguf(model: nn.Module) -> None:
    import gguf
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    kind = gguf.GGMLQuantizationType.Q8_0

    def make(old: nn.Linear) -> nn.Module:
        new = GGUFLinear(old.in_features, old.out_features, bias=True, compute_dtype=old.weight.dtype)
        data = torch.from_numpy(gguf.quants.quantize(old.weight.detach().float().numpy(), kind).copy())
        new.weight = GGUFParameter(data, requires_grad=False, quant_type=kind)
        new.bias = old.bias
        return new

    replace_linears(model, make)


QUANTIZERS: dict[str, Callable[[nn.Module], None]] = {
    "fp32": lambda model: None,
    "bf16": lambda model: None,
    "bitsandbytes_nf4": _four_bit("nf4"),
    "bitsandbytes_nf4_nested": _four_bit("nf4", nested=True),
    "bitsandbytes_nf4_repacked": _four_bit("nf4", nested=True, repack=True),
    "bitsandbytes_fp4": _four_bit("fp4"),
    "bitsandbytes_int8": _eight_bit(0.0),
    "bitsandbytes_int8_bf16": _eight_bit(0.0),
    "bitsandbytes_int8_outliers": _eight_bit(6.0),
    "torchao_int8wo": _torchao(lambda ao: ao.Int8WeightOnlyConfig()),
    "torchao_int8dq": _torchao(lambda ao: ao.Int8DynamicActivationInt8WeightConfig()),
    "torchao_float8wo_e4m3": _torchao(lambda ao: ao.Float8WeightOnlyConfig(weight_dtype=torch.float8_e4m3fn)),
    "torchao_float8wo_e5m2": _torchao(lambda ao: ao.Float8WeightOnlyConfig(weight_dtype=torch.float8_e5m2)),
    "torchao_intx": _torchao(lambda ao: ao.IntxWeightOnlyConfig(weight_dtype=torch.int4)),
    "quanto_int8": _quanto("qint8"),
    "quanto_int4": _quanto("qint4"),
    "quanto_int2": _quanto("qint2"),
    "quanto_float8": _quanto("qfloat8"),
    "gguf_q8_0": _gguf,
}


LOADED = tuple(f"conf/{name}" for name in option_names("backend"))  # kinds: every option, as a load makes it
RECIPE = [
    {"modules": "embed", "backend": "bitsandbytes"},
    {"modules": "blocks.0.fc1", "backend": "gguf", "quant_type": "Q5_1"},
    {"modules": "blocks.*.fc1", "backend": "torchao"},
    {"modules": "head", "backend": "bitsandbytes_int8", "llm_int8_threshold": 0},
    {"backend": "quanto_int4"},
]


def save(folder: Path, depth: int = 3) -> FolderSource:
    """The seeded model as a checkpoint."""
    torch.manual_seed(0)
    return FolderSource(save_state(folder, Net(depth).state_dict(), {"depth": depth}), Net)


@cache
def option(backend: str) -> Any:
    """The config of an option of conf/backend, mixed with a recipe."""
    if backend == "mixed":
        return backend_of(backend, {"recipe": RECIPE})
    (path,) = backend_files([backend])
    return backend_config(path)


def load(backend: str, *, depth: int = 3, device: str = "cpu", workers: int = 1, **placement: Any) -> nn.Module:
    """The same model quantized while it is loaded, by an option of conf/backend."""
    with tempfile.TemporaryDirectory() as folder:
        source = save(Path(folder), depth)
        return load_from(source, backend, device=device, workers=workers, **placement)


def load_from(source: Any, backend: str, *, device: str, workers: int = 1, **placement: Any) -> nn.Module:
    settings, loader = ComponentConfig(option(backend)), LoaderConfig(workers=workers)
    return load_component(source, "model", settings, device=torch.device(device), loader=loader, **placement).model


def make(kind: str, *, depth: int = 3) -> nn.Module:
    """The same seeded model every time, quantized."""
    if kind in LOADED:
        return load(kind.removeprefix("conf/"), depth=depth)
    torch.manual_seed(0)
    model = Net(depth).requires_grad_(False)
    if kind.endswith("bf16"):
        model.to(torch.bfloat16)
    QUANTIZERS[kind](model)
    return model.eval()  # last: modules that were put in are in training mode


def inputs(model: nn.Module, count: int = 3) -> list[Tensor]:
    """Different inputs, with a few columns above the outlier threshold of LLM.int8."""
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(4, WIDTH, generator=generator) for _ in range(count)]
    for batch in batches:
        batch[:, 3] *= 20
    return [batch.to(model.scale.dtype) for batch in batches]


def outputs(model: nn.Module, batches: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [model(batch) for batch in batches]
