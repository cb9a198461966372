"""What a loaded model carries, for other libraries and for saving, and what is taken off when it is dequantized.

Under upstream's names: `hf_quantizer`, `quantization_method`, `is_quantized`, `_pre_quantization_dtype`, and for models
of diffusers and transformers `quantization_config` in their own config (`qexp/interop/interfaces.py`).
`checkpoint_config` is the parsed config.json of the checkpoint, for the config.json to be saved; `checkpoint_path` is
where it is, which is no place to save to. A quantized model is also guarded (`quantized_model.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qexp.errors import ConfigError
from qexp.interop.interfaces import interface_of
from qexp.loading.quantized_model import guard, unguard
from qexp.loading.straight_through import give_backward
from qexp.offloading.payload import leaves, sites
from qexp.offloading.strategies import resident
from qexp.quantizers.base import Quantizer

MARKS = ("hf_quantizer", "quantization_method", "_pre_quantization_dtype")


def register(
    model: nn.Module,
    quantizer: Quantizer,
    config: Mapping[str, Any],
    path: Path,
    compute_dtype: torch.dtype,
    carried_files: tuple[str, ...] = (),
) -> None:
    """Mark a model that was just loaded. config, path: the checkpoint's config.json, and where it is; compute_dtype:
    quantized from it; carried_files: names of what a saved model takes along from there."""
    marked: Any = model
    marked.checkpoint_path, marked.carried_files = path.absolute(), carried_files
    marked.checkpoint_config = {name: value for name, value in config.items() if name != "quantization_config"}
    if quantizer.quantization_method == "none":
        return
    marked._pre_quantization_dtype = compute_dtype
    marked.quantization_method = quantizer.quantization_method
    marked.is_quantized = True
    for name, value in quantizer.model_attributes.items():
        setattr(model, name, value)
    interface = interface_of(model)
    marked.hf_quantizer = quantizer if interface is None else interface.attach(model, quantizer)
    if not quantizer.has_backward:
        give_backward(model, quantizer)
    guard(model)


def registered_quantizer(model: nn.Module) -> Quantizer | None:
    """The quantizer of a model that was loaded quantized, and was not dequantized since."""
    found = getattr(model, "hf_quantizer", None)
    found = getattr(found, "quantizer", found)  # from behind the interface for its class
    return found if isinstance(found, Quantizer) else None


def dequantize(model: nn.Module, quantizer: Quantizer, dtype: torch.dtype | None = None) -> nn.Module:
    """Put ordinary linear layers back, in place, and take off all that says that the model is quantized.

    dtype: of their weights; None is the dtype that they were quantized from. An offloaded model is offloaded again.
    Raises: ConfigError if another library has taken the weights out of the model.
    """
    _refuse_without_weights(model)
    marked: Any = model
    with resident(model):
        quantizer.restore_linear_layers(model, dtype or marked._pre_quantization_dtype)
        _unregister(model, quantizer)
    return model


def _refuse_without_weights(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if any(leaf.is_meta for store, key in sites(module) for leaf in leaves(store[key])):
            raise ConfigError(
                f"dequantize: weights of '{name or type(model).__name__}' are held by another library's hooks; remove "
                "them first, as accelerate.hooks.remove_hook_from_module(model, recurse=True) does"
            )


def _unregister(model: nn.Module, quantizer: Quantizer) -> None:
    unguard(model)
    for name in (*MARKS, *quantizer.model_attributes):
        vars(model).pop(name, None)
    vars(model)["is_quantized"] = False
    interface = interface_of(model)
    if interface is not None:
        interface.detach(model)
