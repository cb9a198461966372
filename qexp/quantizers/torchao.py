"""torchao: int8 and float8 weights as tensor subclasses on ordinary linear layers.

int8wo: symmetric int8, one fp32 scale a row, or one for `group_size` weights. int8dq: the same weights, and
activations quantized to int8 token by token at run time. float8wo: float8 (e4m3fn or e5m2), one fp32 scale a row.
The weight is quantized row slice by row slice; scales are per row or finer, so the result is that of the whole.

`quant_type` uses the shorthands that torchao once had and its users know; each stands for a config class of today.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from qexp.errors import ConfigError, LoadError, choices
from qexp.quantizers import base
from qexp.quantizers.configs import BackendConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from qexp.loading.checkpoint import TensorEntry

QUANT_TYPES = ("int8wo", "int8dq", "float8wo", "float8wo_e4m3", "float8wo_e5m2")


@dataclass(frozen=True)
class TorchAoConfig(BackendConfig):
    """group_size: weights that share a scale (int8wo only); null is one scale a row."""

    quant_method: str = "torchao"
    quant_type: str = "int8wo"
    group_size: int | None = None
    modules_to_not_convert: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quant_type not in QUANT_TYPES:
            raise ConfigError(f"backend.quant_type={self.quant_type!r} is unknown; use {choices(QUANT_TYPES)}")
        if self.group_size is not None and self.quant_type != "int8wo":
            raise ConfigError(
                f"backend.group_size={self.group_size} is for int8wo, not {self.quant_type}; set it to null"
            )
        if self.group_size is not None and self.group_size < 1:
            raise ConfigError(f"backend.group_size={self.group_size} must be 1 or more, or null for one scale a row")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TorchAoConfig:
        """The config that upstream's `quantization_config` describes. Raises ConfigError for what is not supported."""
        described = values.get("quant_type", {})
        config = described.get("default", {}) if isinstance(described, Mapping) else {}
        kind, data = config.get("_type"), config.get("_data", {})
        shorthand = {
            "Int8WeightOnlyConfig": "int8wo",
            "Int8DynamicActivationInt8WeightConfig": "int8dq",
            "Float8WeightOnlyConfig": "float8wo_" + str(data.get("weight_dtype", {}).get("_data")).split("_")[-1][:4],
        }.get(str(kind))
        if shorthand not in QUANT_TYPES:
            raise ConfigError(f"quantization_config.quant_type={kind!r} of torchao is not supported")
        group_size = data.get("granularity", {}).get("_data", {}).get("group_size") if shorthand == "int8wo" else None
        return cls(quant_type=shorthand, group_size=group_size, label=shorthand)


class TorchAoQuantizer(base.Quantizer):
    config: TorchAoConfig
    required_packages: ClassVar[Mapping[str, str]] = {"torchao": "0.18"}
    is_serializable = True

    def reason_to_skip(self, spec: base.WeightSpec) -> str | None:
        size, columns = self.config.group_size, spec.shape[1]
        if size is None or columns % size == 0:
            return None
        fitting = [n for n in (16, 32, 64, 128, 256) if columns % n == 0]
        remedy = f"use {choices(fitting)}, or add" if fitting else "add"
        raise ConfigError(
            f"backend.group_size={size} does not divide in_features={columns} of '{spec.module}'; "
            f"{remedy} the layer to skip_modules"
        )

    def quantized_nbytes(self, spec: base.WeightSpec) -> int:
        groups = spec.shape[1] // self.config.group_size if self.config.group_size else 1
        scales = spec.shape[0] * groups
        zero_points = scales if self.config.quant_type.startswith("int8") else 0  # int8, stored though all zero
        return spec.numel + 4 * scales + zero_points

    def create_quantized_param(
        self, spec: base.WeightSpec, sources: Sequence[Tensor], companions: Mapping[str, Tensor], device: torch.device
    ) -> nn.Parameter:
        import torch

        if companions:
            tensors = [tensor.to(device) for tensor in (sources[0], *companions.values())]
            return torch.nn.Parameter(self._assemble(spec, tensors), requires_grad=False)
        quantize_ = _library().quantize_
        holder = torch.nn.Linear(1, 1, bias=False, device="meta")
        config, rows_of = self._library_config(), base.RowAssembler(spec.shape[0])
        for rows, part in base.row_slices(spec, sources[0], device):
            holder.weight = torch.nn.Parameter(part, requires_grad=False)
            quantize_(holder, config, filter_fn=lambda module, name: True)
            quantized: Any = holder.weight.data
            names, context = quantized.__tensor_flatten__()
            inner = {name: getattr(quantized, name) for name in names}
            base.clear_nan(inner["qdata"])
            rows_of.add(rows, inner)
        tensor = type(quantized).__tensor_unflatten__(rows_of.inner, context, spec.shape, (spec.shape[1], 1))
        return torch.nn.Parameter(tensor, requires_grad=False)

    def _library_config(self) -> Any:
        import torch

        ao, kind = _library(), self.config.quant_type
        if kind == "int8dq":
            return ao.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
        if kind == "int8wo":
            size = self.config.group_size
            granularity = ao.PerGroup(size) if size else ao.PerRow()
            return ao.Int8WeightOnlyConfig(granularity=granularity, set_inductor_config=False)
        dtype = torch.float8_e5m2 if kind.endswith("e5m2") else torch.float8_e4m3fn
        return ao.Float8WeightOnlyConfig(weight_dtype=dtype, set_inductor_config=False)

    def stored_parts(self, name: str, entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry] | None:
        description = self.metadata.get(f"{name}.weight")
        names = json.loads(description).get("_tensor_data_names", ()) if description else ()
        lacking = [part for part in names if f"{name}._weight_{part}" not in entries]
        if lacking:
            raise LoadError(f"the checkpoint lacks '{name}._weight_{lacking[0]}', a part of a quantized weight")
        return {part: entries[f"{name}._weight_{part}"] for part in names} or None

    def check_quantized_param_shape(self, spec: base.WeightSpec, parts: Mapping[str, TensorEntry]) -> None:
        stored = parts.get("qdata")
        if stored is None or stored.shape != spec.shape:
            found = list(stored.shape) if stored is not None else "nothing"
            raise LoadError(
                f"the quantized weight of '{spec.module}' is stored as {found}, but the model expects "
                f"{list(spec.shape)}; the checkpoint belongs to another configuration"
            )

    def _assemble(self, spec: base.WeightSpec, tensors: Sequence[Tensor]) -> Tensor:
        from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

        name = f"{spec.module}.weight"
        names = json.loads(self.metadata[name])["_tensor_data_names"]
        flat = {f"{spec.module}._weight_{part}": tensor for part, tensor in zip(names, tensors, strict=True)}
        metadata = {"tensor_names": json.dumps([name]), name: self.metadata[name]}
        weights, _ = unflatten_tensor_state_dict(flat, metadata)
        weight: Tensor = weights[name]
        return weight

    def get_state_dict_and_metadata(self, state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
        from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

        tensors, metadata = flatten_tensor_state_dict(dict(state_dict))
        return tensors, {**metadata, "format": "pt"}

    def to_dict(self, model: nn.Module) -> dict[str, Any]:
        from torchao.core.config import config_to_dict

        return {
            "modules_to_not_convert": base.unquantized_layers(self, model),
            "quant_method": self.quantization_method,
            "quant_type": {"default": config_to_dict(self._library_config())},
        }

    def is_quantized(self, module: nn.Module) -> bool:
        _library()
        from torchao.utils import TorchAOBaseTensor

        return isinstance(getattr(module, "weight", None), TorchAOBaseTensor)

    def dequantize_param(self, param: Any, dtype: torch.dtype) -> Tensor:
        return param.dequantize().to(dtype)


@cache
def _library() -> Any:
    with base.quiet():  # warns of kernels for other machines
        from torchao import quantization
    return quantization


Config = TorchAoConfig
Quantizer = TorchAoQuantizer
