"""The `hf_quantizer` of transformers' `PreTrainedModel`, used by `save_pretrained`, `dequantize` and training."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

from qexp.config.module_patterns import anywhere
from qexp.interop.interfaces import quantization_config, saves_safetensors
from qexp.quantizers.base import Quantizer


class InterfaceQuantizer(HfQuantizer):
    """A qexp quantizer behind transformers' interface, for a loaded model."""

    def __init__(self, quantizer: Quantizer, quantization_config: Any, is_readable: bool) -> None:
        super().__init__(quantization_config, pre_quantized=quantizer.stored)
        self.quantizer = quantizer
        self.config = quantizer.config
        self._is_readable = is_readable

    def is_serializable(self) -> bool:
        """Return False for quanto: transformers would open the saved model with random weights."""
        return saves_safetensors(self.quantizer) and self._is_readable

    @property
    def is_trainable(self) -> bool:
        return self.quantizer.is_trainable

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        return self.quantizer.get_state_dict_and_metadata(model.state_dict())

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return self.quantizer.is_quantized(model.get_submodule(param_name.rpartition(".")[0]))

    def update_device_map(self, device_map: Any) -> Any:
        return self.quantizer.update_device_map(device_map)

    def adjust_max_memory(self, max_memory: dict[Any, Any]) -> dict[Any, Any]:
        return self.quantizer.adjust_max_memory(max_memory)

    def calibrate(self, model: Any, run: Callable[[], object]) -> None:
        self.quantizer.calibrate(model, run)

    def dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        return self.quantizer.dequantize(model, dtype)


def kept_by_class(model: Any, dtype: torch.dtype) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the patterns to keep (in fp32, unquantized), by transformers' rules.

    `_keep_in_fp32_modules` stay in fp32 in fp16 models (their values exceed its range), the strict ones in bf16 models,
    too; an entry matches any part of a name. They are never quantized, since their callers check dtypes. Tensors that a
    class creates in fp32 (routers of experts, decays) stay in fp32, too.
    """
    kept, strict = (
        sorted(getattr(model, name, None) or ()) for name in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    )
    in_fp32 = (*(kept if dtype == torch.float16 else ()), *strict)
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    made = (name for name, own in dtypes.items() if own == torch.float32 != dtype and dtype in dtypes.values())
    return (*(anywhere(f"*{entry}*") for entry in in_fp32), *made), tuple(map(anywhere, kept))


def saved_config(model: Any) -> dict[str, Any]:
    """Return the config.json of `save_pretrained`, with the model's current class and dtype.

    The library's writer encodes infinity, which JSON lacks. The caller adds the quantization_config.
    """
    config, dtype = copy.copy(model.config), getattr(model, "_pre_quantization_dtype", model.dtype)
    config.architectures, config.dtype = [type(model).__name__], str(dtype).removeprefix("torch.")
    vars(config).pop("quantization_config", None)
    values: dict[str, Any] = json.loads(config.to_json_string())
    values.pop("_is_quantized", None)
    return values


def attach(model: Any, quantizer: Quantizer) -> InterfaceQuantizer:
    model.config.quantization_config = quantization_config(model, quantizer, auto)
    _set_quantized(model, True)
    is_readable = quantizer.misread(model, True) is None
    return InterfaceQuantizer(quantizer, model.config.quantization_config, is_readable)


def detach(model: Any) -> None:
    vars(model.config).pop("quantization_config", None)
    _set_quantized(model, False)


def _set_quantized(model: Any, is_quantized: bool) -> None:
    """Set the flag on the model and its submodels; attention kernels choose their dtype by it."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and is_quantized:
            module.config._is_quantized = True
        elif isinstance(module, PreTrainedModel):
            vars(module.config).pop("_is_quantized", None)
