"""Build torchao's config objects from plain values, and quantize with them.

Imports torch and torchao, so it is imported only when a model is loaded.
"""

from __future__ import annotations

import importlib
import re
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qexp.errors import ConfigError, choices, did_you_mean
from qexp.quantizers.torchao_support.names import SHORTHANDS
from qexp.quantizers.torchao_support.types import library_call
from qexp.system.imports import quiet

with quiet():  # warns of kernels for other machines
    from torchao.core.config import ALLOWED_AO_MODULES, AOBaseConfig
    from torchao.quantization import (
        FqnToConfig,
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        PerGroup,
        PerRow,
        quantize_,
    )
    from torchao.utils import TorchAOBaseTensor

VALUES = "torchao.quantization"  # where granularities and the like are, beside the modules that have configs


@cache
def config_classes() -> dict[str, Any]:
    """Return every config class that torchao can read from a config.json, by name."""
    found: dict[str, Any] = {}
    for name in sorted(ALLOWED_AO_MODULES, key=lambda name: (name != VALUES, name)):
        found = {**_classes_in(name), **found}
    return found


def find_config_class(name: str) -> Any:
    """Return the config class of a name, None if there is none.

    Those of torchao.quantization are found without importing the modules of the others, some of which import
    transformers.
    """
    if not name.endswith("Config"):
        return None
    return _classes_in(VALUES).get(name) or config_classes().get(name)


@cache
def _classes_in(module_name: str) -> dict[str, Any]:
    try:
        with quiet():
            module = importlib.import_module(module_name)
    except ImportError:  # torchao lists modules that it no longer has
        return {}
    found = {name: item for name, item in vars(module).items() if isinstance(item, type) and name == item.__name__}
    return {
        name: item
        for name, item in found.items()
        if issubclass(item, AOBaseConfig) and item is not AOBaseConfig and name.endswith("Config")
    }


def build(name: str, arguments: Mapping[str, Any]) -> Any:
    """Build a config object of torchao. Raises ConfigError for an unknown class or rejected arguments."""
    config_class = find_config_class(name)
    if config_class is None:
        classes = config_classes()
        raise ConfigError(
            f"backend.quant_type={name} is not a config class of torchao that a checkpoint can store"
            f"{did_you_mean(name, classes)}; use {choices(classes)}"
        )
    known = {item.name: item for item in fields(config_class)} if is_dataclass(config_class) else {}
    needed = [item.name for item in known.values() if item.default is item.default_factory is MISSING]
    if "act_quant_scale" in known or "step" in needed:
        raise ConfigError(
            f"backend.quant_type={name} needs calibration data, which a load does not have; use a type with dynamic "
            "activation scales, such as int8dq or float8dq_e4m3_tensor"
        )
    if lacking := [argument for argument in needed if argument not in arguments]:
        raise ConfigError(f"backend.quant_type={name} needs quant_type_kwargs.{lacking[0]}")
    for argument in arguments:
        if argument not in known:
            place = f"backend.quant_type_kwargs.{argument} is not an argument of {name}"
            raise ConfigError(f"{place}{did_you_mean(argument, known)}; it takes {choices(known)}")
    hints = typing.get_type_hints(config_class)
    values = {key: _value(value, hints[key], known[key].default, key) for key, value in arguments.items()}
    if "set_inductor_config" in known:
        values.setdefault("set_inductor_config", False)  # True changes how torch.compile works everywhere
    return _build_config(config_class, values)


def config_for(config: Any, module: str) -> Any:
    """Return the config of one layer in a FqnToConfig, None if it stays unquantized; other configs apply to all layers.

    The order is diffusers': the exact name of the parameter, then of the module; patterns; _default.
    """
    if not isinstance(config, FqnToConfig):
        return config
    by_name, names = config.fqn_to_config, (f"{module}.weight", module)
    for name in names:
        if name in by_name:
            return by_name[name]
    for name in names:
        for pattern, value in by_name.items():
            if pattern.startswith("re:") and re.fullmatch(pattern[3:], name):
                return value
    return by_name.get("_default")


def quantize(weight: Tensor, config: Any) -> Tensor:
    """Quantize a weight [out, in] with torchao: return a tensor subclass, or the weight if it stays unquantized."""
    holder = torch.nn.Linear(1, 1, bias=False, device="meta")
    holder.weight = torch.nn.Parameter(weight, requires_grad=False)
    quantize_(holder, config, filter_fn=lambda module, name: True)
    quantized = holder.weight.data
    holder._parameters.clear()  # torchao leaves the layer in a reference cycle, which would keep the weight for a while
    return quantized


def int8_group_size(config: Any, columns: int) -> int | None:
    """Return the group size if the config is symmetric int8 as `rowwise_8bit` computes it, else None."""
    if type(config) not in (Int8WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig):
        return None
    granularity = config.granularity
    if isinstance(granularity, PerGroup):
        return granularity.group_size
    is_rowwise = isinstance(granularity, PerRow) and granularity.dim == -1 and not getattr(config, "reduce_range", None)
    return columns if is_rowwise else None


def dequantize(weight: Tensor) -> Tensor:
    """Return the dense weight [out, in] in its own dtype."""
    try:
        return weight.dequantize()
    except NotImplementedError:  # of a class that only has a kernel: what that makes of the unit vectors, exactly
        units = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
        return torch.nn.functional.linear(units, weight).T.contiguous()


def inner_tensors(tensor: Any) -> dict[str, Tensor]:
    return {name: getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]}


def is_quantized(tensor: Any) -> bool:
    return isinstance(tensor, TorchAOBaseTensor)


def _value(value: Any, hint: Any, default: Any, place: str) -> Any:
    """Convert a plain value to the object of an argument: a dtype, an enum member, a granularity, a config."""
    if isinstance(value, Mapping) and "_type" in value:
        rest = {key: item for key, item in value.items() if key != "_type"}
        return _object(str(value["_type"]), rest, place)
    if isinstance(value, Mapping):
        return {key: _value(item, Any, None, f"{place}.{key}") for key, item in value.items()}
    if isinstance(value, list):
        return [_value(item, hint, default, place) for item in value]
    if not isinstance(value, str):
        return value
    if value in SHORTHANDS:  # of a layer of a FqnToConfig
        return build(*library_call(value, {}, None))
    if isinstance(dtype := getattr(torch, value.removeprefix("torch."), None), torch.dtype):
        return dtype
    if (enum := _enum(hint, default)) is not None:
        members = {name.upper(): member for name, member in enum.__members__.items()}
        members.update({str(member.value).upper(): member for member in enum})
        if value.upper() not in members:
            names = [member.name for member in enum]
            given = f"backend.quant_type_kwargs.{place}={value} is unknown{did_you_mean(value, names)}"
            raise ConfigError(f"{given}; use {choices(names)}")
        return members[value.upper()]
    return _object(value, {}, place) if re.fullmatch(r"[A-Z]\w*", value) else value


def _enum(hint: Any, default: Any) -> type[Enum] | None:
    kinds = [type(default), hint, *typing.get_args(hint)]
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Enum)), None)


def _object(name: str, arguments: Mapping[str, Any], place: str) -> Any:
    if find_config_class(name) is not None:
        return build(name, arguments)
    modules = (importlib.import_module(module) for module in (VALUES, "torchao.quantization.granularity"))
    cls = next((getattr(module, name) for module in modules if hasattr(module, name)), None)
    if cls is None or (not is_dataclass(cls) and not hasattr(cls, "_fields")):
        granularity = importlib.import_module("torchao.quantization.granularity")
        known = [key for key, item in vars(granularity).items() if is_dataclass(item) and key.startswith("Per")]
        raise ConfigError(
            f"backend.quant_type_kwargs.{place}={name} is unknown{did_you_mean(name, known)}; use {choices(known)}"
        )
    return _build_config(cls, {key: _value(value, Any, None, f"{place}.{key}") for key, value in arguments.items()})


def _build_config(cls: Any, arguments: Mapping[str, Any]) -> Any:
    try:
        return cls(**arguments)
    except (AssertionError, TypeError, ValueError) as error:
        shown = ", ".join(f"{name}={value}" for name, value in arguments.items() if name != "set_inductor_config")
        raise ConfigError(
            f"backend.quant_type: torchao rejects {cls.__name__}({shown}): {error}; change quant_type_kwargs"
        ) from None
