"""The `hf_quantizer` of diffusers' `ModelMixin`, used by `save_pretrained`, `dequantize` and the config."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer

from qexp.config.module_patterns import anywhere
from qexp.interop.interfaces import quantization_config, saves_safetensors
from qexp.quantizers.base import Quantizer, unquantized_layers

CONFIG_ENTRIES = ("quantization_config", "_pre_quantization_dtype")


class InterfaceQuantizer(DiffusersQuantizer):
    """A qexp quantizer behind diffusers' interface, for a loaded model."""

    def __init__(
        self, quantizer: Quantizer, quantization_config: Any, modules_to_not_convert: list[str], is_readable: bool
    ) -> None:
        super().__init__(
            quantization_config, pre_quantized=quantizer.stored, modules_to_not_convert=modules_to_not_convert
        )
        self.quantizer = quantizer
        self.config = quantizer.config
        self._is_readable = is_readable

    @property
    def is_serializable(self) -> bool:
        """Return False if diffusers would open the saved model with other weights."""
        return saves_safetensors(self.quantizer) and self._is_readable

    @property
    def is_trainable(self) -> bool:
        return self.quantizer.is_trainable

    def get_state_dict_and_metadata(
        self, state_dict: Mapping[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        if not safe_serialization:
            return dict(state_dict), {}
        return self.quantizer.get_state_dict_and_metadata(state_dict)

    def update_device_map(self, device_map: Any) -> Any:
        return self.quantizer.update_device_map(device_map)

    def adjust_target_dtype(self, torch_dtype: Any) -> Any:
        return self.quantizer.adjust_target_dtype(torch_dtype)

    def get_special_dtypes_update(self, model: Any, torch_dtype: torch.dtype) -> dict[str, torch.dtype]:
        return self.quantizer.get_special_dtypes_update(model, torch_dtype)

    def adjust_max_memory(self, max_memory: dict[Any, Any]) -> dict[Any, Any]:
        return self.quantizer.adjust_max_memory(max_memory)

    def calibrate(self, model: Any, run: Callable[[], object]) -> None:
        self.quantizer.calibrate(model, run)

    def dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        return self.quantizer.dequantize(model, dtype)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("this quantizer belongs to a loaded model; load models with qexp.load()")

    _process_model_after_weight_loading = _process_model_before_weight_loading


def kept_by_class(model: Any, dtype: torch.dtype) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the patterns to keep (in fp32, unquantized): diffusers keeps `_keep_in_fp32_modules` in any dtype."""
    return tuple(map(anywhere, model._keep_in_fp32_modules or ())), ()


def saved_config(model: Any) -> dict[str, Any]:
    """Return the config.json of `save_pretrained` without quantization_config, which the caller adds."""
    values: dict[str, Any] = json.loads(model.to_json_string())
    return {name: value for name, value in values.items() if name not in CONFIG_ENTRIES}


def attach(model: Any, quantizer: Quantizer) -> InterfaceQuantizer:
    config = quantization_config(model, quantizer, auto)
    model.register_to_config(quantization_config=config, _pre_quantization_dtype=model._pre_quantization_dtype)
    is_readable = quantizer.misread(model, False) is None
    return InterfaceQuantizer(quantizer, config, unquantized_layers(quantizer, model), is_readable)


def detach(model: Any) -> None:
    model._internal_dict = FrozenDict(
        {name: value for name, value in model.config.items() if name not in CONFIG_ENTRIES}
    )
