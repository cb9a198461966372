"""LLM.int8's parameter, which says the dtype that its layer computes in."""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes import nn as library_nn
from torch import Tensor


class Int8Params(library_nn.Int8Params):
    """The library's, but for `dtype`: networks cast activations to `layer.weight.dtype`, which must not be int8.

    `data.dtype` is int8, which the library itself looks at.
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


def int8_params(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Int8Params:
    """The quantized parameter of rows [out, in], with their absmaxes [out]. dtype: what its layer computes in."""
    found = Int8Params(values, requires_grad=False, has_fp16_weights=False, CB=values, SCB=scale)
    return shown_as(found, dtype)


def shown_as(parameter: Any, dtype: torch.dtype | None) -> Any:
    """A parameter of the library as ours, which shows a dtype."""
    if isinstance(parameter, library_nn.Int8Params):
        parameter.__class__ = Int8Params
        parameter.shown_dtype = dtype
    return parameter
