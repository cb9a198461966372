"""Find the interface module for a model of diffusers or transformers, without importing these libraries.

`interface_of(model)` returns the module of this package for the model's library. Its `attach(model, quantizer)` enters
the quantization in the model's own config and returns an `hf_quantizer`: qexp's quantizer in an object of the library's
base class. `detach(model)` removes it from the config. `saved_config(model)` returns the config.json that the library
would write.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

from qexp.config.module_patterns import anywhere
from qexp.quantizers.base import Quantizer
from qexp.system.imports import quiet

if TYPE_CHECKING:
    import torch
    from torch import nn

INTERFACES = {
    ("diffusers.models.modeling_utils", "ModelMixin"): "qexp.interop.diffusers",
    ("transformers.modeling_utils", "PreTrainedModel"): "qexp.interop.transformers",
}


def interface_of(model: Any) -> ModuleType | None:
    """Return the interface module of the model's library; None for other classes."""
    for kind in type(model).__mro__:
        if (kind.__module__, kind.__name__) in INTERFACES:
            return importlib.import_module(INTERFACES[kind.__module__, kind.__name__])
    return None


def kept_by_class(model: Any, dtype: torch.dtype) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the patterns that a model's class keeps (in fp32, unquantized), for the compute dtype `dtype`."""
    interface = interface_of(model)
    if interface is not None:
        kept: tuple[tuple[str, ...], tuple[str, ...]] = interface.kept_by_class(model, dtype)
        return kept
    return tuple(map(anywhere, getattr(model, "_keep_in_fp32_modules", None) or ())), ()


@dataclass(frozen=True)
class SavedConfig:
    """A `quantization_config` for methods without a class in the library, with the attributes that it reads."""

    values: Mapping[str, Any]

    @property
    def quant_method(self) -> str:
        return str(self.values["quant_method"])

    def to_dict(self) -> dict[str, Any]:
        return dict(self.values)

    to_diff_dict = to_dict


def quantization_config(model: nn.Module, quantizer: Quantizer, library: Any) -> Any:
    """Return `hf_quantizer.quantization_config`: an object of the library's own class, if it has one.

    library: the module with the library's AUTO_QUANTIZATION_CONFIG_MAPPING.
    """
    values = quantizer.to_dict(model)
    if not saves_safetensors(quantizer):
        return SavedConfig(values)
    name = values["quant_method"]
    name += "_4bit" if values.get("load_in_4bit") else "_8bit" if values.get("load_in_8bit") else ""
    kind = library.AUTO_QUANTIZATION_CONFIG_MAPPING.get(name)
    with quiet(), warnings.catch_warnings(action="ignore"):  # of a deprecated class, and of fields of our own
        return SavedConfig(values) if kind is None else kind.from_dict(values)


def saves_safetensors(quantizer: Quantizer) -> bool:
    """Return whether the library's `save_pretrained`, which writes safetensors, can save the model."""
    return quantizer.is_serializable and quantizer.file_format == "safetensors"
