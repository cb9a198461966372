"""optimum-quanto: int8, int4, int2 and float8 weights in `QLinear` modules.

int8 and float8: symmetric, one scale a row. int4 and int2: affine, a scale and a shift for each group of 128 weights
(96, 64 or 32 where 128 does not divide a longer row; else one group a row), packed below a byte. Scales have the
dtype that the weight is quantized from. On a CPU, int4 in bf16 takes the library's layout for its int4 kernel; where
that kernel cannot run (out_features not divisible by 16) the weight is kept in the general layout instead of failing.

transformers opens diffusers' quanto files with random weights: it looks for X.weight, not for X.weight._data. Models of
transformers are therefore saved as `quant_method: qexp_quanto`, with the data as X.weight in the shape [..., 1], which
transformers rejects; `save.interchange=true` keeps quanto's own names.

Activations can be quantized, too: `quanto_support/activations.py`. Workarounds for the library:
`quanto_support/library.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from typing_extensions import override

from qexp.errors import ConfigError, choices
from qexp.quantizers import base
from qexp.quantizers.configs import BackendConfig
from qexp.quantizers.cpu_kernels.readiness import are_ready
from qexp.quantizers.layers import replace_module
from qexp.quantizers.quanto_support import activations
from qexp.quantizers.quanto_support.library import library
from qexp.quantizers.rows import RowAssembler, Rows, WeightSpec, check_slice, clear_nan, row_slices
from qexp.quantizers.stored import FLOATS, Part, check_parts, lacks

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from qexp.checkpoints.tensor_entry import TensorEntry

STORED_DTYPES = {  # weights_dtype -> safetensors' name for what is stored
    "int8": "I8", "int4": "U8", "int2": "U8",
    "float8": "F8_E4M3", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip
ACTIVATIONS_DTYPES = ("int8", "float8", "float8_e4m3fn", "float8_e5m2")
ACTIVATION_SCALES = ("input_scale", "output_scale")
TINYGEMM_ROWS = 64  # rows that its packing interleaves
TINYGEMM_MULTIPLE = {"cpu": 16, "cuda": 8}  # device type -> what has to divide out_features


@dataclass(frozen=True)
class QuantoConfig(BackendConfig):
    """weights_dtype: float8 is float8_e4m3fn; activations_dtype: null leaves them as they are; calibration_samples:
    samples of the task that run through the model to find the scales of activations."""

    quant_method: str = "quanto"
    weights_dtype: str = "int8"
    activations_dtype: str | None = None
    calibration_samples: int = 16
    modules_to_not_convert: tuple[str, ...] = ()

    # transformers' names
    also_read: ClassVar[Mapping[str, str]] = {"weights": "weights_dtype", "activations": "activations_dtype"}

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights_dtype not in STORED_DTYPES:
            raise ConfigError(f"backend.weights_dtype={self.weights_dtype!r} is unknown; use {choices(STORED_DTYPES)}")
        if self.activations_dtype not in (None, *ACTIVATIONS_DTYPES):
            place = f"backend.activations_dtype={self.activations_dtype!r}"
            raise ConfigError(f"{place} is unknown; use {choices(ACTIVATIONS_DTYPES)}, or null to leave them")
        if self.calibration_samples < 1:
            raise ConfigError(f"backend.calibration_samples={self.calibration_samples} must be 1 or more")

    @override
    def check_as_rule(self) -> None:
        super().check_as_rule()
        if self.activations_dtype is not None:
            raise ConfigError(
                f"activations_dtype={self.activations_dtype} is calibrated by running the whole model; set it to null, "
                "or use backend=quanto without a recipe"
            )

    @override
    def quantizes_activations(self) -> bool:
        return self.activations_dtype is not None

    def ignored_fields(self) -> set[str]:
        """Return the fields without effect on this configuration, which are left out of the run key."""
        return {"calibration_samples"} if self.activations_dtype is None else set()

    @override
    def to_dict(self) -> dict[str, Any]:
        """Return diffusers' form, with its only float8 (e4m3fn), and further fields only if they are used."""
        values = super().to_dict()
        values["weights_dtype"] = "float8" if self.weights_dtype == "float8_e4m3fn" else self.weights_dtype
        if self.activations_dtype is None:
            del values["activations_dtype"], values["calibration_samples"]
        return values

    @classmethod
    @override
    def types(cls) -> list[dict[str, Any]]:
        weights = [{"weights_dtype": name} for name in STORED_DTYPES if name != "float8_e4m3fn"]  # which is float8
        return [*weights, {"weights_dtype": "int8", "activations_dtype": "int8"}]

    @override
    def describe(self) -> str | None:
        return self.weights_dtype + (f"/{self.activations_dtype}" if self.activations_dtype else "")


class QuantoQuantizer(base.Quantizer):
    config: QuantoConfig
    required_packages: ClassVar[Mapping[str, str]] = {"optimum-quanto": "0.2.7"}
    imports: ClassVar[tuple[str, ...]] = ("qexp.quantizers.quanto_support.library:library", base.FOR_DISPATCH)
    has_kernels = True
    is_serializable = True
    _calibrated = False

    @property
    @override
    def requires_calibration(self) -> bool:
        return self.config.activations_dtype is not None and not self.stored

    @override
    def update_torch_dtype(self, dtype: torch.dtype) -> torch.dtype:
        import torch

        if dtype == torch.float16 and self.config.activations_dtype is not None:
            raise ConfigError(
                f"backend.activations_dtype={self.config.activations_dtype} with compute_dtype=fp16: the product of "
                "the scales of weights and inputs underflows to zero; use compute_dtype=bf16 or fp32"
            )
        return dtype

    @override
    def reason_to_skip(self, spec: WeightSpec) -> str | None:
        if self._bits < 8 and group_count(spec) == 1:
            return f"quanto {self.config.weights_dtype} cannot hold a single group of weights"
        return None

    @override
    def preprocess_model(self, model: nn.Module, names: Sequence[str], compute_dtype: torch.dtype) -> None:
        quanto = library()
        for name in names:
            linear = model.get_submodule(name)
            new = quanto.QLinear(
                linear.in_features,
                linear.out_features,
                bias=linear.bias is not None,
                dtype=compute_dtype,
                device="meta",
                weights=self._qtype,
                activations=self._activation_qtype,
                quantize_input=True,
            )
            new.disable_output_quantization()
            if self.requires_calibration:
                activations.refuse_to_run(new)
            new.requires_grad_(False)
            replace_module(model, name, new.train(linear.training))

    @property
    def _qtype(self) -> Any:
        return getattr(library(), f"q{self.config.weights_dtype}")

    @property
    def _activation_qtype(self) -> Any:
        name = self.config.activations_dtype
        return None if name is None else getattr(library(), f"q{name}")

    @override
    def calibrate(self, model: nn.Module, run: Callable[[], object]) -> None:
        if self.config.activations_dtype is None:
            return
        from qexp.offloading.strategies import resident

        self._calibrated = False
        with resident(model):  # an offloaded module's scales would be those that are at rest
            layers = {name: module for name, module in model.named_modules() if self.is_quantized(module)}
            activations.calibrate(layers, run)
        self._calibrated = True

    @override
    def quantized_nbytes(self, spec: WeightSpec) -> int:
        rows, parameters = (spec.shape[0], 1) if self._bits == 8 else (group_count(spec), 2)
        packed_rows = math.ceil(rows * self._bits / 8)
        return packed_rows * (spec.numel // rows) + parameters * rows * spec.dtype.itemsize

    @property
    def _bits(self) -> int:
        return {"int4": 4, "int2": 2}.get(self.config.weights_dtype, 8)

    @override
    def create_quantized_param(
        self, spec: WeightSpec, sources: Sequence[Tensor], companions: Mapping[str, Tensor], device: torch.device
    ) -> nn.Parameter:
        import torch

        if companions:
            first, *_ = self._part_names()
            weight = self._assemble(spec, {first: sources[0], **companions}, device)
            return torch.nn.Parameter(weight, requires_grad=False)
        create = self._create_8bit if self._bits == 8 else self._create_packed
        return torch.nn.Parameter(create(spec, sources[0], device), requires_grad=False)

    def _create_8bit(self, spec: WeightSpec, weight: Tensor | Rows, device: torch.device) -> Tensor:
        import torch

        qtype, rows_of = self._qtype, RowAssembler(spec.shape[0])
        axis = None if spec.shape[0] == 1 else 0  # the library's rule
        has_loop = device.type == "cpu" and qtype.dtype == torch.int8
        for rows, part in row_slices(spec, weight, device, check=not has_loop):
            if has_loop and are_ready():
                from qexp.quantizers.cpu_kernels.rowwise_8bit import quanto_int8

                scale = quanto_int8(part, rows_of.room("data", rows, part.shape, torch.int8))
            else:
                scale = library().AbsmaxOptimizer()(part, qtype=qtype, axis=axis)
                data = torch.ops.quanto.quantize_symmetric(part, dtype=qtype.dtype, axis=axis, scale=scale)
                clear_nan(data)
                rows_of.add(rows, {"data": data})
            if has_loop:
                check_slice(spec, rows, scale)
            rows_of.add(rows, {"scale": scale.reshape(-1, 1)})
        data, scale, stride = rows_of.inner["data"], rows_of.inner["scale"], (spec.shape[1], 1)
        scale = scale if axis == 0 else scale.squeeze()
        return library().WeightQBytesTensor.create(qtype, axis, spec.shape, stride, data, scale, self._activation_qtype)

    def _create_packed(self, spec: WeightSpec, weight: Tensor | Rows, device: torch.device) -> Tensor:
        import torch

        qtype, rows_of, size = self._qtype, RowAssembler(spec.shape[0]), group_size(spec.shape[1])
        kind, shape = library().WeightQBitsTensor, torch.Size(spec.shape)
        fits = tinygemm_fits(spec.shape[0], device)
        tinygemm = fits and (qtype.bits, spec.dtype, size, device.type) == (4, torch.bfloat16, 128, "cpu")
        create = kind.create if fits else kind  # the library would choose its kernel's layout, and raise
        for rows, part in row_slices(spec, weight, device, TINYGEMM_ROWS):
            scale, shift = library().MaxOptimizer()(part, qtype=qtype, axis=0, group_size=size)
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

    @override
    def stored_parts(self, name: str, entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry] | None:
        names = {part: f"{name}.weight.{part}" for part in self._part_names()}
        found = {part: entries[stored] for part, stored in names.items() if stored in entries}
        data, *_ = self._part_names()
        refused = entries.get(f"{name}.weight")
        if found and data not in found and refused is not None and refused.shape[-1:] == (1,):
            found = {data: replace(refused, shape=refused.shape[:-1]), **found}
        if not found:
            return None
        if lacking := [stored for part, stored in names.items() if part not in found]:
            raise lacks(f"'{lacking[0]}', a part of a quantized weight")
        return found

    @override
    def check_quantized_param_shape(self, spec: WeightSpec, parts: Mapping[str, TensorEntry]) -> None:
        data, *scales = self._part_names()
        rows = spec.shape[0] if self._bits == 8 else group_count(spec)
        shape = spec.shape if self._bits == 8 else (math.ceil(rows * self._bits / 8), spec.numel // rows)
        whole = spec.shape[0] == 1 and self._bits == 8  # then there is one scale, without dimensions
        per_row = Part(FLOATS, ((), (1, 1)) if whole else ((rows, 1),))
        expected = {data: Part((STORED_DTYPES[self.config.weights_dtype],), (shape,)), **dict.fromkeys(scales, per_row)}
        check_parts(spec, parts, expected, f"quanto's {self.config.weights_dtype}")

    def _assemble(self, spec: WeightSpec, parts: Mapping[str, Tensor], device: torch.device) -> Tensor:
        state, stride = {part: tensor.to(device) for part, tensor in parts.items()}, (spec.shape[1], 1)
        missing: list[str] = []
        if self._bits == 8:
            axis, inputs = 0 if state["_scale"].dim() else None, self._activation_qtype
            weight = library().WeightQBytesTensor.load_from_state_dict(
                state, "", self._qtype, axis, spec.shape, stride, activation_qtype=inputs, missing_keys=missing
            )
        else:
            size = group_size(spec.shape[1])
            weight = library().WeightQBitsTensor.load_from_state_dict(
                state, "", self._qtype, 0, size, spec.shape, stride, missing_keys=missing
            )
        fits = self._bits == 8 or tinygemm_fits(spec.shape[0], device)  # see the module's docstring
        return weight.optimize() if fits else weight

    @override
    def get_state_dict_and_metadata(self, state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
        if self.requires_calibration and not self._calibrated:
            raise ConfigError(f"save: {activations.UNKNOWN}")
        return super().get_state_dict_and_metadata(state_dict)

    @override
    def to_dict(self, model: nn.Module) -> dict[str, Any]:
        """Add the last parts of the names of unquantized layers, the only ones that diffusers compares."""
        values = super().to_dict(model)
        names = values[self.config.skip_field]
        return {**values, self.config.skip_field: [*names, *sorted({_last_part(name) for name in names} - {*names})]}

    @override
    def misread(self, model: nn.Module, is_of_transformers: bool) -> str | None:
        if is_of_transformers:
            return (
                "transformers opens this folder with random weights and only mentions it in a report; qexp reads it, "
                "and so does optimum.quanto.requantize with the tensors of its safetensors files"
            )
        return super().misread(model, is_of_transformers)

    @override
    def taken_by_diffusers(self, layer: str, kept: Sequence[str]) -> bool | None:
        return _last_part(layer) not in kept

    @override
    def under_refused_names(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        ending = f".{self._part_names()[0]}"  # of X.weight
        return dict(
            (name.removesuffix(ending), tensor[..., None]) if name.endswith(f".weight{ending}") else (name, tensor)
            for name, tensor in tensors.items()
        )

    @override
    def update_missing_keys(self, missing: Sequence[str]) -> list[str]:
        used = ("input_scale",) if self.stored and self.config.activations_dtype else ()  # nothing else would tell it
        settled = [name for name in ACTIVATION_SCALES if name not in used]
        return [key for key in missing if key.rpartition(".")[2] not in settled]

    @override
    def is_quantized(self, module: nn.Module) -> bool:
        return isinstance(module, library().QLinear) and isinstance(module.weight, library().QTensor)

    @override
    def postprocess_model(self, model: nn.Module, device: torch.device) -> None:
        import torch

        for module in model.modules():
            if isinstance(module, library().QLinear):
                for name in ACTIVATION_SCALES:  # 1: not quantized, or not calibrated yet
                    if getattr(module, name).is_meta:  # no checkpoint holds it
                        setattr(module, name, torch.ones_like(getattr(module, name), device=module.weight.device))

    @override
    def dequantize_param(self, param: Any, dtype: torch.dtype) -> Tensor:
        return param.dequantize().to(dtype)


def tinygemm_fits(rows: int, device: torch.device) -> bool:
    return rows % TINYGEMM_MULTIPLE.get(device.type, 1) == 0


def group_size(in_features: int) -> int | None:
    """Return the group size in int4 and int2 by the library's rule; None is the whole row."""
    sizes = (128, 96, 64, 32) if in_features > 128 else ()
    return next((size for size in sizes if in_features % size == 0), None)


def group_count(spec: WeightSpec) -> int:
    return spec.numel // (group_size(spec.shape[1]) or spec.shape[1])


def _last_part(name: str) -> str:
    return name.rpartition(".")[2]


Config = QuantoConfig
Quantizer = QuantoQuantizer
