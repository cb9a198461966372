"""Models of diffusers and transformers: what their classes expect of a quantized model, found without an import.

`interface_of(model)` is the module of this package that speaks to the model's library. Its `attach(model, quantizer)`
enters the quantization in the model's own config and returns an `hf_quantizer`, ours inside an object of the library's
own base class; `detach(model)` takes it out of the config again. `saved_config(model)` is the config.json that the
library would write.
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
    """The interface to the library that the model's class comes from; None for any other class."""
    for kind in type(model).__mro__:
        if (kind.__module__, kind.__name__) in INTERFACES:
            return importlib.import_module(INTERFACES[kind.__module__, kind.__name__])
    return None


def kept_by_class(model: Any, dtype: torch.dtype) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Patterns of what a model's class keeps: (in fp32, in a model that computes in `dtype`; unquantized)."""
    interface = interface_of(model)
    if interface is not None and hasattr(interface, "kept_by_class"):
        kept: tuple[tuple[str, ...], tuple[str, ...]] = interface.kept_by_class(model, dtype)
        return kept
    in_fp32 = tuple(map(anywhere, getattr(model, "_keep_in_fp32_modules", None) or ()))
    return in_fp32, ()


@dataclass(frozen=True)
class SavedConfig:
    """A `quantization_config` of a method that the library has no class for: what it reads from one, and saves."""

    values: Mapping[str, Any]

    @property
    def quant_method(self) -> str:
        return str(self.values["quant_method"])

    def to_dict(self) -> dict[str, Any]:
        return dict(self.values)

    to_diff_dict = to_dict


def quantization_config(model: nn.Module, quantizer: Quantizer, library: Any) -> Any:
    """What `hf_quantizer.quantization_config` is: an object of the library's own class, where it has one.

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
    """Whether the library's `save_pretrained`, which writes safetensors, can save such a model."""
    return quantizer.is_serializable and quantizer.file_format == "safetensors"
