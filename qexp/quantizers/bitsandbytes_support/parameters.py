"""bitsandbytes parameters that report the compute dtype and ignore casts."""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes import nn as library_nn
from torch import Tensor


class Int8Params(library_nn.Int8Params):
    """The library's class with the compute dtype as `dtype`: networks cast activations to `layer.weight.dtype`.

    `data.dtype` is int8, which the library itself reads.
    """

    shown_dtype: torch.dtype | None = None

    @property
    def dtype(self) -> torch.dtype:
        own: torch.dtype = super().dtype
        return self.shown_dtype if self.shown_dtype is not None and own == torch.int8 else own

    def to(self, *args: Any, **kwargs: Any) -> Any:
        return shown_as(super().to(*args, **kwargs), self.shown_dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return shown_as(super().__deepcopy__(memo), self.shown_dtype)


class Params4bit(library_nn.Params4bit):
    """The library's class without casts: its packed bytes, stored in a floating-point dtype, must not be converted.

    Networks cast some of their layers (Switch its router, to fp32); uint8 bytes would ignore the cast anyway.
    """

    def to(self, *args: Any, **kwargs: Any) -> Any:
        device, _, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        moved = self if device is None else super().to(device=device, non_blocking=non_blocking)
        return safe_from_casts(moved)

    def float(self, *_: Any, **__: Any) -> Any:
        return self

    half = bfloat16 = double = float


def int8_params(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Int8Params:
    """Return the quantized parameter of rows [out, in], with their absmaxes [out]. dtype: of its layer's products."""
    found = Int8Params(values, requires_grad=False, has_fp16_weights=False, CB=values, SCB=scale)
    return shown_as(found, dtype)


def shown_as(parameter: Any, dtype: torch.dtype | None) -> Any:
    """Convert the library's parameter to one that reports a dtype."""
    if isinstance(parameter, library_nn.Int8Params):
        parameter.__class__ = Int8Params
        parameter.shown_dtype = dtype
    return parameter


def safe_from_casts(parameter: Any) -> Any:
    """Convert the library's parameter to one that ignores casts."""
    parameter.__class__ = Params4bit
    return parameter
