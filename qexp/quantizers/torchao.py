"""torchao: weights as tensor subclasses on ordinary linear layers.

`quant_type` is any name by which torchao's types are known (`names.py`), with `quant_type_kwargs` as its
arguments. The common ones: int8wo, symmetric int8, one fp32 scale a row, or one for `group_size` weights; int8dq, the
same weights, and activations quantized to int8 token by token at run time; int4dq, 4-bit integers in groups of 32,
stored a byte each, and int8 activations; float8wo_e4m3 and _e5m2, one fp32 scale a row; float8dq, activations too.

Types that torchao no longer has, and int4wo without a GPU, are packed by qexp: `resolved` returns a config of
`qexp_packed`, and results carry that name. A weight is quantized in slices of rows if that gives the same bytes as the
whole weight (`layout.py`), which is always so except with one scale for a whole weight.

On disk: torchao's own safetensors format, which diffusers reads and writes; `X._weight_qdata`, `X._weight_scale` … for
layer X, described in the file's metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

from typing_extensions import override

from qexp.config.recipe import format_name
from qexp.errors import ConfigError, LoadError, UnsupportedError, choices
from qexp.quantizers import base
from qexp.quantizers.configs import BackendConfig
from qexp.quantizers.cpu_kernels.readiness import are_ready
from qexp.quantizers.packed.elements import ELEMENTS
from qexp.quantizers.qexp_packed import PackedConfig
from qexp.quantizers.rows import RowAssembler, WeightSpec, check_parameters, check_slice, clear_nan, row_slices
from qexp.quantizers.stored import check_parts, lacks
from qexp.quantizers.torchao_support.names import CLASSES, SHORTHANDS
from qexp.quantizers.torchao_support.types import default_group_size, library_call, settle, spelled

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from qexp.checkpoints.tensor_entry import TensorEntry
    from qexp.quantizers.torchao_support.layout import Layout

FQN_TO_CONFIG = "FqnToConfig"
PACKED_INT4_GROUP_SIZE = 128  # torchao's default for int4wo


@dataclass(frozen=True)
class TorchAoConfig(BackendConfig):
    """quant_type, quant_type_kwargs: see `torchao_support/names.py` and `types.py`.

    group_size: weights that share a scale; null is the type's default.
    """

    quant_method: str = "torchao"
    quant_type: str = "int8wo"
    quant_type_kwargs: dict[str, Any] = field(default_factory=dict)
    group_size: int | None = None
    modules_to_not_convert: tuple[str, ...] = ()

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        quant_type, arguments, group_size = settle(self.quant_type, self.quant_type_kwargs, self.group_size)
        if self.label == self.quant_type:
            object.__setattr__(self, "label", quant_type)
        vars(self).update(quant_type=quant_type, quant_type_kwargs=arguments, group_size=group_size)

    @override
    def resolved(self, device_type: str) -> BackendConfig:
        """Return the config that runs: this one, or the packed format's."""
        packed = self.quant_type in ELEMENTS and self.quant_type != "int4wo"
        if not packed and not (self.quant_type == "int4wo" and device_type == "cpu" and not self.quant_type_kwargs):
            return self
        own = PACKED_INT4_GROUP_SIZE if self.quant_type == "int4wo" else PackedConfig.group_size
        return PackedConfig(
            label=self.label,
            quant_type=self.quant_type,
            group_size=self.group_size or own,
            modules_to_not_convert=self.modules_to_not_convert,
        )

    @override
    def quantizes_activations(self) -> bool:
        return "DynamicActivation" in library_call(self.quant_type, self.quant_type_kwargs, self.group_size)[0]

    @override
    def to_dict(self) -> dict[str, Any]:
        from torchao.core.config import config_to_dict

        return {
            "modules_to_not_convert": list(self.modules_to_not_convert) or None,
            "quant_method": self.quant_method,
            "quant_type": {"default": config_to_dict(self.library_config())},
        }

    @classmethod
    @override
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build the config from upstream's dict: today's form, or the former name and `quant_type_kwargs`."""
        fields = {name: value for name, value in values.items() if name not in UNUSED_IF_FALSE or value}
        described = fields.pop("quant_type", "int8wo")
        if isinstance(described, Mapping):
            if described.keys() != {"default"} or not isinstance(described["default"], Mapping):
                raise ConfigError("quantization_config.quant_type must have one config, named default")
            stored = described["default"]
            name, arguments = str(stored.get("_type")), dict(stored.get("_data", {}))
            version, known = stored.get("_version", 1), CLASSES.get(name)
            if version != (known.version if known else 1):
                arguments["version"] = version
            if arguments.get("group_size", 0) is None:  # of a class whose groups are a granularity now
                del arguments["group_size"]
            fields |= {"quant_type": name, "quant_type_kwargs": spelled(arguments)}
        else:
            fields |= {"quant_type": described}
        return super().from_dict(fields)

    @override
    def describe(self) -> str:
        return self.quant_type

    @classmethod
    @override
    def types(cls) -> list[dict[str, Any]]:
        return [{"quant_type": name} for name in SHORTHANDS]

    def library_config(self) -> Any:
        """Return torchao's config object. Raises ConfigError for an unknown class or arguments that torchao rejects."""
        from qexp.quantizers.torchao_support.library import build

        return build(*library_call(self.quant_type, self.quant_type_kwargs, self.group_size))


UNUSED_IF_FALSE = ("include_input_output_embeddings", "untie_embedding_weights")  # transformers' own


class TorchAoQuantizer(base.Quantizer):
    config: TorchAoConfig
    required_packages: ClassVar[Mapping[str, str]] = {"torchao": "0.18"}
    imports: ClassVar[tuple[str, ...]] = ("qexp.quantizers.torchao_support.layout", base.FOR_DISPATCH)
    has_kernels = True
    is_serializable = True
    has_backward = False  # missing for types that quantize activations

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._built: Any = None
        self._layouts: dict[Any, Layout | None] = {}
        self._templates: dict[Any, tuple[Any, Any]] = {}
        self._names: dict[int, str] = {}  # of the configs in a FqnToConfig, by their ids
        self._device: torch.device | None = None

    @override
    def validate_environment(self, device: torch.device) -> None:
        super().validate_environment(device)
        self._device = device
        if self.stored:
            return
        if self.config.resolved(device.type) is not self.config:
            raise UnsupportedError(
                f"backend.quant_type={self.config.quant_type} is not supported by this torchao on {device.type}; use "
                f"backend.quant_method=qexp_packed with backend.quant_type={self.config.quant_type}"
            )
        from qexp.quantizers.torchao_support.layout import check_machine

        for config in self._each_config():
            check_machine(self.config.quant_type, config, device)

    @override
    def reason_to_skip(self, spec: WeightSpec) -> str | None:
        if self._library_config(spec.module) is None:
            return "FqnToConfig leaves it unquantized"
        size, columns = self.config.group_size or default_group_size(self.config.quant_type), spec.shape[1]
        if size is not None and columns % size:
            fitting = [n for n in (16, 32, 64, 128, 256) if columns % n == 0]
            remedy = f"use {choices(fitting)}, or add" if fitting else "add"
            raise ConfigError(
                f"backend.group_size={size} does not divide in_features={columns} of '{spec.module}'; "
                f"{remedy} the layer to skip_modules"
            )
        return None if self._layout(spec) else f"torchao leaves a weight of {list(spec.shape)} unquantized"

    @override
    def quantized_nbytes(self, spec: WeightSpec) -> int:
        layout = self._layout(spec)
        assert layout is not None, spec
        return layout.nbytes

    @override
    def layer_format(self, layer: str) -> str:
        """Return the layer's format, by its own config in a FqnToConfig."""
        if self.config.quant_type != FQN_TO_CONFIG:
            return super().layer_format(layer)
        from torchao.core.config import config_to_dict

        config = self._library_config(layer)
        if id(config) not in self._names:
            own = TorchAoConfig.from_dict({"quant_type": {"default": config_to_dict(config)}})
            self._names[id(config)] = format_name(own)
        return self._names[id(config)]

    @override
    def common_format(self, layers: Mapping[str, base.Quantizer | None]) -> base.Quantizer | None:
        """Return a quantizer with a FqnToConfig that names every linear layer, null for unquantized ones."""
        if (same := super().common_format(layers)) is not None:
            return same
        from torchao.core.config import config_to_dict

        from qexp.quantizers.torchao_support.library import FqnToConfig

        parts: Mapping[str, Any] = layers
        by_name = {name: None if part is None else part._library_config(name) for name, part in parts.items()}
        described = config_to_dict(FqnToConfig(by_name))
        return TorchAoQuantizer(TorchAoConfig.from_dict({"quant_type": {"default": described}}))

    @override
    def format_key(self, spec: WeightSpec) -> Any:
        return id(self._library_config(spec.module))  # FqnToConfig has one for each name

    @override
    def takes_rows(self, spec: WeightSpec) -> bool:
        layout = self._layout(spec)
        return layout is not None and layout.rows_multiple is not None

    @override
    def create_quantized_param(
        self, spec: WeightSpec, sources: Sequence[Tensor], companions: Mapping[str, Tensor], device: torch.device
    ) -> nn.Parameter:
        import torch

        if self.stored:
            tensors = [tensor.to(device) for tensor in (sources[0], *companions.values())]
            return torch.nn.Parameter(self._assemble(spec, tensors), requires_grad=False)
        from qexp.quantizers.torchao_support.library import inner_tensors, int8_group_size, quantize

        config, layout, rows_of = self._library_config(spec.module), self._layout(spec), RowAssembler(spec.shape[0])
        assert layout is not None, spec
        whole = spec.shape[0] if layout.rows_multiple is None else layout.rows_multiple
        group_size = int8_group_size(config, spec.shape[1]) if device.type == "cpu" else None
        for rows, part in row_slices(spec, sources[0], device, whole, check=group_size is None):
            if group_size is not None and are_ready():
                from qexp.quantizers.cpu_kernels.rowwise_8bit import torchao_int8

                scale = torchao_int8(part, group_size, rows_of.room("qdata", rows, part.shape, torch.int8))
                check_slice(spec, rows, scale)
                rows_of.add(rows, {"scale": scale})
                template = self._template(config, part)
                continue
            quantized: Any = quantize(part, config)
            inner = inner_tensors(quantized)
            if group_size is not None:
                check_slice(spec, rows, inner["scale"])
            clear_nan(inner["qdata"])
            if layout.rows_multiple is None:
                return torch.nn.Parameter(quantized, requires_grad=False)
            rows_of.add(rows, inner)
            template = type(quantized), quantized.__tensor_flatten__()[1]
        (kind, context), parts = template, rows_of.inner
        if group_size is not None:  # symmetric, and loops make none
            parts["zero_point"] = torch.zeros_like(parts["scale"], dtype=torch.int8)
        tensor = kind.__tensor_unflatten__(parts, context, spec.shape, (spec.shape[1], 1))
        return torch.nn.Parameter(tensor, requires_grad=False)

    def _template(self, config: Any, part: Tensor) -> tuple[Any, Any]:
        """Return (torchao's class, what its tensors have beside inner tensors) for a weight with rows as these."""
        from qexp.quantizers.torchao_support.library import quantize

        key = (id(config), part.shape[1], part.dtype)
        if key not in self._templates:
            quantized: Any = quantize(part[:1], config)
            self._templates[key] = type(quantized), quantized.__tensor_flatten__()[1]
        return self._templates[key]

    def _library_config(self, layer: str) -> Any:
        """Return torchao's config for one layer, or None if it stays unquantized."""
        from qexp.quantizers.torchao_support.library import config_for

        if self._built is None:
            self._built = self.config.library_config()
        return config_for(self._built, layer)

    def _each_config(self) -> list[Any]:
        """Return the config for all layers, or all of a FqnToConfig."""
        built = self.config.library_config()
        by_name = getattr(built, "fqn_to_config", None)
        return [built] if by_name is None else [config for config in by_name.values() if config is not None]

    def _layout(self, spec: WeightSpec) -> Layout | None:
        import torch

        from qexp.quantizers.torchao_support.layout import layout_of

        config = self._library_config(spec.module)
        key = (id(config), spec.shape, spec.dtype)
        if key not in self._layouts:
            self._layouts[key] = layout_of(config, spec.shape, spec.dtype, self._device or torch.device("cpu"))
        return self._layouts[key]

    @override
    def stored_parts(self, name: str, entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry] | None:
        names = self._description(name).get("_tensor_data_names", ()) if f"{name}.weight" in self.metadata else ()
        lacking = [part for part in names if f"{name}._weight_{part}" not in entries]
        if lacking:
            raise lacks(f"'{name}._weight_{lacking[0]}', a part of a quantized weight")
        return {part: entries[f"{name}._weight_{part}"] for part in names} or None

    def _description(self, name: str) -> dict[str, Any]:
        """Return the description of a layer's weight in the file's metadata."""
        try:
            description = json.loads(self.metadata[f"{name}.weight"])
        except ValueError:
            description = None
        if not isinstance(description, dict):
            raise LoadError(f"the file's metadata for '{name}.weight' is not a JSON object; download it again")
        return description

    @override
    def check_quantized_param_shape(self, spec: WeightSpec, parts: Mapping[str, TensorEntry]) -> None:
        from qexp.quantizers.torchao_support.layout import stored_layout

        config = self._library_config(spec.module)
        expected = {} if config is None else stored_layout(config, spec.shape, spec.dtype)
        known = {part: entry for part, entry in parts.items() if part in expected}
        check_parts(spec, known, expected, f"torchao's {self.config.quant_type}")

    def _assemble(self, spec: WeightSpec, tensors: Sequence[Tensor]) -> Tensor:
        from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

        name, description = f"{spec.module}.weight", self._description(spec.module)
        attributes = description.get("_data", {})
        for key in ("dtype", "orig_dtype"):  # dequantize to the model's dtype, not the one it was quantized from
            if key in attributes:
                attributes[key] = {"_type": "torch.dtype", "_data": str(spec.dtype).removeprefix("torch.")}
        names = description["_tensor_data_names"]
        flat = {f"{spec.module}._weight_{part}": tensor for part, tensor in zip(names, tensors, strict=True)}
        for part, tensor in zip(names, tensors, strict=True):
            check_parameters(spec.module, part, tensor)
        metadata = {"tensor_names": json.dumps([name]), name: json.dumps(description)}
        try:
            weight: Tensor = unflatten_tensor_state_dict(flat, metadata)[0][name]
        except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise LoadError(
                f"the quantized weight of '{spec.module}' cannot be assembled: {error}; download it again"
            ) from None
        if tuple(weight.shape) != spec.shape:
            raise LoadError(
                f"the quantized weight of '{spec.module}' is {list(weight.shape)}, not {list(spec.shape)}; download it "
                "again"
            )
        return weight

    @override
    def get_state_dict_and_metadata(self, state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
        from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

        try:
            tensors, metadata = flatten_tensor_state_dict(dict(state_dict))
        except ValueError as error:
            raise ConfigError(
                f"save: torchao's files cannot hold {self.config.quant_type} ({error}); dequantize it first"
            ) from None
        return tensors, {**metadata, "format": "pt"}

    @override
    def postprocess_model(self, model: nn.Module, device: torch.device) -> None:
        """Run one stored layer of each kind, to find out whether this machine can."""
        if self.stored:
            from qexp.quantizers.torchao_support.layout import check_runs

            layers = [module for module in model.modules() if self.is_quantized(module)]
            for layer in {type(layer.weight): layer for layer in layers}.values():
                check_runs(layer, self.config.quant_type, device)

    @override
    def taken_by_diffusers(self, layer: str, kept: Sequence[str]) -> bool | None:
        return not any(f"{name}." in f"{layer}.weight" for name in kept)

    @override
    def is_quantized(self, module: nn.Module) -> bool:
        from qexp.quantizers.torchao_support.library import is_quantized

        return is_quantized(getattr(module, "weight", None))

    @override
    def dequantize_param(self, param: Any, dtype: torch.dtype) -> Tensor:
        from qexp.quantizers.torchao_support.library import dequantize

        return dequantize(param).to(dtype)


Config = TorchAoConfig
Quantizer = TorchAoQuantizer
