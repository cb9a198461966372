"""optimum-quanto: int8, int4, int2 and float8 weights in `QLinear` modules.

int8 and float8: symmetric, one scale a row. int4 and int2: affine, a scale and a shift for each group of 128 weights
(96, 64 or 32 where 128 does not divide a longer row; else one group a row), packed below a byte. Scales have the
dtype that the weight is quantized from. On a CPU, int4 in bf16 takes the library's layout for its int4 kernel; where
that kernel cannot run (out_features not divisible by 16) the weight is kept in the general layout instead of failing.

On a CPU, PyTorch's kernel for int8 in bf16 reads rows 16 weights at a time, past their end if it must: rows of another
length are computed the general way. Unpacking int4 and int2 there would make the library compile a C++ extension into
site-packages; a few lines of PyTorch that give the same result are put in the extension's place. On a GPU it would have
nvcc compile another one for minutes, or fail: that is replaced as well, and with it go its kernels for float8 (Marlin)
and for int4 in fp16 (AWQ). Such layers multiply with the dequantized weight; int4 in bf16 has a kernel in PyTorch.

The library writes shapes as text and parses them with `ast`, which Python 3.11 cannot do on several threads at once:
there is a lock.
"""

from __future__ import annotations

import ast
import importlib
import math
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

from qexp.errors import ConfigError, choices
from qexp.quantizers import base
from qexp.quantizers.configs import BackendConfig
from qexp.quantizers.stored import FLOATS, Part, check_parts, lacks

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from qexp.loading.checkpoint import TensorEntry

WEIGHTS_DTYPES = ("int8", "int4", "int2", "float8")
ACTIVATION_SCALES = ("input_scale", "output_scale")
STORED_AS = {"torch.int8": "I8", "torch.float8_e4m3fn": "F8_E4M3", "torch.float8_e5m2": "F8_E5M2"}  # in safetensors
TINYGEMM_ROWS = 64  # rows that its packing interleaves
TINYGEMM_MULTIPLE = {"cpu": 16, "cuda": 8}  # device type -> what has to divide out_features
# torch._weight_int8pack_mm reads 16 columns at a time, from aligned memory: other rows or addresses end in a crash
INT8_KERNEL_COLUMNS = 16
INT8_KERNEL_ALIGNMENT = 32


@dataclass(frozen=True)
class QuantoConfig(BackendConfig):
    quant_method: str = "quanto"
    weights_dtype: str = "int8"
    modules_to_not_convert: tuple[str, ...] = ()

    also_read: ClassVar[Mapping[str, str]] = {"weights": "weights_dtype"}  # transformers' name

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights_dtype not in WEIGHTS_DTYPES:
            raise ConfigError(f"backend.weights_dtype={self.weights_dtype!r} is unknown; use {choices(WEIGHTS_DTYPES)}")

    @classmethod
    def types(cls) -> list[dict[str, Any]]:
        return [{"weights_dtype": name} for name in WEIGHTS_DTYPES]

    def describe(self) -> str | None:
        return self.weights_dtype


class QuantoQuantizer(base.Quantizer):
    config: QuantoConfig
    required_packages: ClassVar[Mapping[str, str]] = {"optimum-quanto": "0.2.7"}
    is_serializable = True

    def reason_to_skip(self, spec: base.WeightSpec) -> str | None:
        if self._bits < 8 and group_count(spec) == 1:
            return f"quanto {self.config.weights_dtype} cannot hold a single group of weights"
        return None

    def preprocess_model(self, model: nn.Module, names: Sequence[str], compute_dtype: torch.dtype) -> None:
        quanto = _library()
        for name in names:
            linear = model.get_submodule(name)
            new = quanto.QLinear(
                linear.in_features,
                linear.out_features,
                bias=linear.bias is not None,
                dtype=compute_dtype,
                device="meta",
                weights=self._qtype,
            )
            new.requires_grad_(False)
            base.replace_module(model, name, new.train(linear.training))

    @property
    def _qtype(self) -> Any:
        return getattr(_library(), f"q{self.config.weights_dtype}")

    def quantized_nbytes(self, spec: base.WeightSpec) -> int:
        scales = spec.shape[0] if self._bits == 8 else 2 * group_count(spec)
        rows = spec.shape[0] if self._bits == 8 else group_count(spec)
        packed_rows = math.ceil(rows * self._bits / 8)
        return packed_rows * (spec.numel // rows) + scales * spec.dtype.itemsize

    @property
    def _bits(self) -> int:
        return {"int4": 4, "int2": 2}.get(self.config.weights_dtype, 8)

    def create_quantized_param(
        self, spec: base.WeightSpec, sources: Sequence[Tensor], companions: Mapping[str, Tensor], device: torch.device
    ) -> nn.Parameter:
        import torch

        if companions:
            first, *_ = self._part_names()
            weight = self._assemble(spec, {first: sources[0], **companions}, device)
            return torch.nn.Parameter(weight, requires_grad=False)
        create = self._create_8bit if self._bits == 8 else self._create_packed
        return torch.nn.Parameter(create(spec, sources[0], device), requires_grad=False)

    def _create_8bit(self, spec: base.WeightSpec, weight: Tensor, device: torch.device) -> Tensor:
        import torch

        qtype, rows_of = self._qtype, base.RowAssembler(spec.shape[0])
        axis = None if spec.shape[0] == 1 else 0  # the library's rule
        for rows, part in base.row_slices(spec, weight, device):
            scale = _library().AbsmaxOptimizer()(part, qtype=qtype, axis=axis)
            data = torch.ops.quanto.quantize_symmetric(part, dtype=qtype.dtype, axis=axis, scale=scale)
            base.clear_nan(data)
            rows_of.add(rows, {"data": data, "scale": scale.reshape(-1, 1)})
        inner, scale = rows_of.inner, rows_of.inner["scale"]
        return _library().WeightQBytesTensor.create(
            qtype, axis, spec.shape, (spec.shape[1], 1), inner["data"], scale if axis == 0 else scale.squeeze()
        )

    def _create_packed(self, spec: base.WeightSpec, weight: Tensor, device: torch.device) -> Tensor:
        import torch

        qtype, rows_of, size = self._qtype, base.RowAssembler(spec.shape[0]), group_size(spec.shape[1])
        kind, shape = _library().WeightQBitsTensor, torch.Size(spec.shape)
        fits = tinygemm_fits(spec.shape[0], device)
        tinygemm = fits and (qtype.bits, spec.dtype, size, device.type) == (4, torch.bfloat16, 128, "cpu")
        create = kind.create if fits else kind  # the library would choose its kernel's layout, and raise
        for rows, part in base.row_slices(spec, weight, device, TINYGEMM_ROWS):
            scale, shift = _library().MaxOptimizer()(part, qtype=qtype, axis=0, group_size=size)
            data = torch.ops.quanto.quantize_affine(
                part, bits=qtype.bits, axis=0, group_size=size, scale=scale, shift=shift
            )
            if tinygemm:  # its packing takes eight times the packed bytes: pack slice by slice
                packed = create(qtype, 0, size, part.shape, part.stride(), data, scale, shift)
                rows_of.add(rows, {"data": packed._data._data, "scale_shift": packed._scale_shift.transpose(0, 1)})
            else:
                rows_of.add(rows, {"data": data, "scale": scale, "shift": shift})
        inner, stride = rows_of.inner, (spec.shape[1], 1)
        if tinygemm:
            tensors = {"_data": type(packed._data)(inner["data"], shape, stride)}
            tensors["_scale_shift"] = inner["scale_shift"].transpose(0, 1).contiguous()
            meta = {**packed.__tensor_flatten__()[1], "size": str(list(shape)), "stride": str(list(stride))}
            return type(packed).__tensor_unflatten__(tensors, meta, shape, stride)
        return create(qtype, 0, size, shape, stride, inner["data"], inner["scale"], inner["shift"])

    def _part_names(self) -> tuple[str, ...]:
        return ("_data", "_scale") if self._bits == 8 else ("_data._data", "_scale", "_shift")

    def stored_parts(self, name: str, entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry] | None:
        names = {part: f"{name}.weight.{part}" for part in self._part_names()}
        lacking = [stored for stored in names.values() if stored not in entries]
        if len(lacking) == len(names):
            return None
        if lacking:
            raise lacks(f"'{lacking[0]}', a part of a quantized weight")
        return {part: entries[stored] for part, stored in names.items()}

    def check_quantized_param_shape(self, spec: base.WeightSpec, parts: Mapping[str, TensorEntry]) -> None:
        data, *scales = self._part_names()
        rows = spec.shape[0] if self._bits == 8 else group_count(spec)
        shape = spec.shape if self._bits == 8 else (math.ceil(rows * self._bits / 8), spec.numel // rows)
        whole = spec.shape[0] == 1 and self._bits == 8  # then there is one scale, without dimensions
        per_row = Part(FLOATS, ((), (1, 1)) if whole else ((rows, 1),))
        stored_as = STORED_AS[str(self._qtype.dtype)] if self._bits == 8 else "U8"
        expected = {data: Part((stored_as,), (shape,)), **dict.fromkeys(scales, per_row)}
        check_parts(spec, parts, expected, f"quanto's {self.config.weights_dtype}")

    def _assemble(self, spec: base.WeightSpec, parts: Mapping[str, Tensor], device: torch.device) -> Tensor:
        state, stride = {part: tensor.to(device) for part, tensor in parts.items()}, (spec.shape[1], 1)
        missing: list[str] = []
        if self._bits == 8:
            axis = 0 if state["_scale"].dim() else None
            weight = _library().WeightQBytesTensor.load_from_state_dict(
                state, "", self._qtype, axis, spec.shape, stride, activation_qtype=None, missing_keys=missing
            )
        else:
            size = group_size(spec.shape[1])
            weight = _library().WeightQBitsTensor.load_from_state_dict(
                state, "", self._qtype, 0, size, spec.shape, stride, missing_keys=missing
            )
        fits = self._bits == 8 or tinygemm_fits(spec.shape[0], device)  # see the module's docstring
        optimized: Tensor = weight.optimize() if fits else weight
        return optimized

    def update_missing_keys(self, missing: Sequence[str]) -> list[str]:
        return [key for key in missing if key.rpartition(".")[2] not in ACTIVATION_SCALES]

    def is_quantized(self, module: nn.Module) -> bool:
        return isinstance(module, _library().QLinear) and isinstance(module.weight, _library().QTensor)

    def postprocess_model(self, model: nn.Module, device: torch.device) -> None:
        import torch

        for module in model.modules():
            if isinstance(module, _library().QLinear):
                for name in ACTIVATION_SCALES:  # 1: activations are not quantized
                    setattr(module, name, torch.ones_like(getattr(module, name), device=module.weight.device))

    def dequantize_param(self, param: Any, dtype: torch.dtype) -> Tensor:
        return param.dequantize().to(dtype)


def tinygemm_fits(rows: int, device: torch.device) -> bool:
    return rows % TINYGEMM_MULTIPLE.get(device.type, 1) == 0


def group_size(in_features: int) -> int | None:
    """Weights that share a scale in int4 and int2: the library's rule for a row of `in_features`; None is the row."""
    sizes = (128, 96, 64, 32) if in_features > 128 else ()
    return next((size for size in sizes if in_features % size == 0), None)


def group_count(spec: base.WeightSpec) -> int:
    return spec.numel // (group_size(spec.shape[1]) or spec.shape[1])


@cache
def _library() -> Any:
    """The library, with the replacements that the module's docstring explains."""
    with base.quiet():  # the library imports diffusers where it is installed
        from optimum import quanto
        from optimum.quanto.library.extensions.cpp import ext

    ext._lib = SimpleNamespace(unpack=unpack)
    for kind in ("cuda", "hip"):
        if extension := sys.modules.get(f"optimum.quanto.library.extensions.{kind}"):
            extension.ext._lib = SimpleNamespace(unpack=unpack)
            extensions: Any = importlib.import_module("optimum.quanto.library.extensions.extension")
            extensions._extensions.pop(f"quanto_{kind}", None)  # with it the layouts that need its other kernels
    for layout in ("tinygemm", "awq", "marlin"):  # which the library would import with the first weight of that layout
        importlib.import_module(f"optimum.quanto.tensor.weights.{layout}")
    for name, module in list(sys.modules.items()):
        if name.startswith("optimum.quanto.") and getattr(module, "ast", None) is ast:
            module.ast = SimpleNamespace(literal_eval=literal_eval)  # type: ignore[attr-defined]
    products: Any = importlib.import_module("optimum.quanto.library.qbytes_mm")
    products.qbytes_int8pack_mm = int8_product(products.qbytes_int8pack_mm, products.qbytes_mm)
    return quanto


def int8_product(kernel: Callable[..., Tensor], general: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """activations [..., in] x int8 weights [out, in] * scales [out, 1] -> [..., out], by `kernel` where it is safe."""

    def product(activations: Tensor, weights: Tensor, scales: Tensor) -> Tensor:
        aligned = all(tensor.data_ptr() % INT8_KERNEL_ALIGNMENT == 0 for tensor in (activations, weights))
        safe = aligned and weights.shape[1] % INT8_KERNEL_COLUMNS == 0
        return (kernel if safe else general)(activations, weights, scales)

    return product


_parsing = threading.RLock()


def literal_eval(text: str) -> Any:
    """`ast.literal_eval` on one thread at a time; on several it fails now and then with a SystemError."""
    with _parsing:
        return ast.literal_eval(text)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Values of `bits` bits out of bytes: uint8 [rows, ...] -> uint8 [rows * 8 / bits, ...].

    The values of a byte lie `rows` apart: the lowest bits hold the first part of the rows.
    """
    import torch

    mask = 2**bits - 1
    return torch.cat([(packed >> shift) & mask for shift in range(0, 8, bits)])


Config = QuantoConfig
Quantizer = QuantoQuantizer
