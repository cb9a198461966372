"""Bit-packed weights of 1 to 8 bits, integers or floats: N bits per weight and 16 or 32 bits per group.

`uint1wo` … `uint8wo`: unsigned integers with scale and offset (32 bits per group). `int4wo` is another name of
`uint4wo`. `fpX_eAwB`, 3 to 8 bits: floats with a sign, A bits of exponent and B of mantissa, and a scale (16 bits per
group). Formulas: `packed/codes.py`; the order of the bits: `packed/bits.py`; the weight in a layer: `packed/tensor.py`.
Everything is PyTorch and runs on any device.

Layers stay `nn.Linear`. A forward pass dequantizes the weight slice by slice, so these formats trade speed for memory.
Integers with fewer than 3 bits are for experiments: on Gaussian weights their error is a third of the weight. The names
are those of torchao 0.7, which had both kinds; other programs read neither its packing nor this one.

On disk, in safetensors, a packed weight of layer X with N bits, [out, in], is stored as

    X.weight         uint8 [out, N, ceil(in / 8)]   the packed rows, cut as `packed/bits.py` draws them
    X.weight.scale   bf16 [out, groups]
    X.weight.offset  bf16 [out, groups]             integers only

and config.json has `quantization_config: {quant_method: qexp_packed, quant_type, group_size, modules_to_not_convert}`.
Other programs do not misread it as a dense weight: diffusers rejects the quant_method, and transformers, which ignores
an unknown quant_method, rejects the third dimension.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from typing_extensions import override

from qexp.errors import ConfigError, choices, did_you_mean
from qexp.quantizers import base
from qexp.quantizers.configs import BackendConfig
from qexp.quantizers.packed.elements import ELEMENTS
from qexp.quantizers.rows import RowAssembler, WeightSpec, check_parameters, row_slices
from qexp.quantizers.stored import Part, check_parts, lacks

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from qexp.checkpoints.tensor_entry import TensorEntry

PARAMETER_BYTES = 2  # bf16


@dataclass(frozen=True)
class PackedConfig(BackendConfig):
    """group_size: consecutive weights of a row that share a scale; null is the whole row."""

    quant_method: str = "qexp_packed"
    quant_type: str = "uint4wo"
    group_size: int | None = 64
    modules_to_not_convert: tuple[str, ...] = ()

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quant_type not in ELEMENTS:
            raise ConfigError(
                f"backend.quant_type={self.quant_type!r} is unknown{did_you_mean(self.quant_type, ELEMENTS)}; "
                f"use {choices(ELEMENTS)}"
            )
        if self.group_size is not None and self.group_size < 1:
            raise ConfigError(f"backend.group_size={self.group_size} must be 1 or more, or null for one scale a row")

    @classmethod
    @override
    def types(cls) -> list[dict[str, Any]]:
        return [{"quant_type": name} for name in ELEMENTS]

    @override
    def describe(self) -> str:
        return self.quant_type


class PackedQuantizer(base.Quantizer):
    config: PackedConfig
    imports: ClassVar[tuple[str, ...]] = ("qexp.quantizers.packed.tensor", base.FOR_DISPATCH)
    has_kernels = True
    rows_alone = True
    is_serializable = True

    @override
    def reason_to_skip(self, spec: WeightSpec) -> str | None:
        size, columns = self.config.group_size, spec.shape[1]
        if size is None or columns % size == 0:
            return None
        fitting = [n for n in range(16, 257) if columns % n == 0]
        sizes = f"{choices(fitting)}, or null" if fitting else "null"
        raise ConfigError(
            f"backend.group_size={size} does not divide in_features={columns} of '{spec.module}'; "
            f"use {sizes} for one scale a row, or add the layer to skip_modules"
        )

    @property
    def parameters(self) -> tuple[str, ...]:
        """The parameters of a group: scale, and offset for integers."""
        return ("scale",) if ELEMENTS[self.config.quant_type].is_float else ("scale", "offset")

    def inner_shapes(self, shape: tuple[int, int]) -> dict[str, tuple[int, int]]:
        """Return the shapes of the inner tensors of a packed weight [out, in]: qdata in uint8, the others in bf16."""
        (rows, columns), element = shape, ELEMENTS[self.config.quant_type]
        per_group = dict.fromkeys(self.parameters, (rows, columns // (self.config.group_size or columns)))
        return {"qdata": (rows, element.bits * math.ceil(columns / 8)), **per_group}

    @override
    def quantized_nbytes(self, spec: WeightSpec) -> int:
        shapes = self.inner_shapes(spec.shape)
        return sum(
            rows * columns * (1 if name == "qdata" else PARAMETER_BYTES) for name, (rows, columns) in shapes.items()
        )

    @override
    def create_quantized_param(
        self, spec: WeightSpec, sources: Sequence[Tensor], companions: Mapping[str, Tensor], device: torch.device
    ) -> nn.Parameter:
        import torch

        from qexp.quantizers.packed.codes import encode
        from qexp.quantizers.packed.tensor import PackedTensor

        if companions:
            return torch.nn.Parameter(self._assemble(spec, sources[0], companions, device), requires_grad=False)
        groups, rows_of = spec.shape[1] // (self.config.group_size or spec.shape[1]), RowAssembler(spec.shape[0])
        for rows, part in row_slices(spec, sources[0], device):
            rows_of.add(rows, encode(part, self.config.quant_type, groups))
        tensor = PackedTensor(rows_of.inner, self.config.quant_type, spec.shape, spec.dtype)
        return torch.nn.Parameter(tensor, requires_grad=False)

    def _assemble(
        self, spec: WeightSpec, stored: Tensor, companions: Mapping[str, Tensor], device: torch.device
    ) -> Tensor:
        from qexp.quantizers.packed.tensor import PackedTensor

        qdata = stored.view(self.inner_shapes(spec.shape)["qdata"])
        inner = {name: tensor.to(device) for name, tensor in {"qdata": qdata, **companions}.items()}
        for name in companions:
            check_parameters(spec.module, name, inner[name])
        return PackedTensor(inner, self.config.quant_type, spec.shape, spec.dtype)

    @override
    def stored_parts(self, name: str, entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry] | None:
        stored = {"qdata": f"{name}.weight", "scale": f"{name}.weight.scale", "offset": f"{name}.weight.offset"}
        parts = {part: entries[entry] for part, entry in stored.items() if entry in entries}
        if parts.keys() <= {"qdata"} and not (parts and parts["qdata"].dtype == "U8"):
            return None
        needed = ["qdata", *self.parameters]
        for part in needed:
            if part not in parts:
                raise lacks(f"'{stored[part]}', a part of a packed weight")
        return {part: parts[part] for part in needed}

    @override
    def check_quantized_param_shape(self, spec: WeightSpec, parts: Mapping[str, TensorEntry]) -> None:
        rows, columns = spec.shape
        size, bits = self.config.group_size or columns, ELEMENTS[self.config.quant_type].bits
        per_group = Part(("BF16",), ((rows, columns // size),) if columns % size == 0 else ())
        qdata = Part(("U8",), ((rows, bits, math.ceil(columns / 8)),))
        expected = {"qdata": qdata, "scale": per_group, "offset": per_group}
        check_parts(spec, parts, expected, f"{self.config.quant_type} in groups of {size}")

    @override
    def get_state_dict_and_metadata(self, state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
        from qexp.quantizers.packed.tensor import PackedTensor

        tensors: dict[str, Tensor] = {}
        for name, tensor in state_dict.items():
            if not isinstance(tensor, PackedTensor):
                tensors[name] = tensor
                continue
            qdata, *parameters = tensor.inner_tensors.items()
            bits = ELEMENTS[tensor.quant_type].bits
            tensors[name] = qdata[1].view(tensor.shape[0], bits, -1)
            tensors.update({f"{name}.{part}": value for part, value in parameters})
        return tensors, {}

    @override
    def is_quantized(self, module: nn.Module) -> bool:
        from qexp.quantizers.packed.tensor import PackedTensor

        return isinstance(getattr(module, "weight", None), PackedTensor)


Config = PackedConfig
Quantizer = PackedQuantizer
