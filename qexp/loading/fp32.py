"""Where modules of several dtypes meet: what is kept in fp32 in a model, and models of one pipeline.

A model whose class lists `_keep_in_fp32_modules` casts around them in its own code (which of them are in fp32:
`interop/interfaces.py`). Modules that a user keeps in fp32 are met by activations in the compute dtype: they are cast
on the way in, and the answer on the way out. Pipelines hand on what one model gives to the next, which gets it in its
own.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from qexp.config.module_patterns import covering
from qexp.offloading.grouping import is_called

IN_FP32 = re.compile("timestep|guidance|rotary|freqs")  # in the names of arguments that are so whatever a model's dtype


def compute_in_fp32(model: nn.Module, patterns: Sequence[str], compute_dtype: torch.dtype) -> None:
    """Hook the outermost modules that `patterns` cover, so that they take and give the compute dtype.

    A container such as a ModuleList is never called: what it holds is hooked in its place.
    """
    if compute_dtype == torch.float32:
        return
    hooked: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in hooked)
        if inside or not name or not is_called(module) or covering(patterns, name) is None:
            continue
        if any(True for _ in module.parameters()):
            module.register_forward_pre_hook(_to_fp32, with_kwargs=True)
            module.register_forward_hook(partial(_to_compute_dtype, compute_dtype))
            hooked.append(name)


def cast_between(models: Iterable[tuple[nn.Module, torch.dtype]]) -> None:
    """Let each of several models take activations in its own compute dtype, if they have different ones.

    An autoencoder is called by its `encode` and `decode`; a pipeline may have cast it to fp32 before. What networks
    embed in fp32 stays as it is: times, guidance, and tables of rotations.
    """
    models = list(models)
    if len({dtype for _, dtype in models}) == 1:
        return
    for model, dtype in models:
        model.register_forward_pre_hook(partial(_to_own, dtype), with_kwargs=True)
        for name in ("encode", "decode"):
            if inspect.ismethod(getattr(model, name, None)):
                setattr(model, name, MethodType(partial(_call_in_own, name, dtype), model))  # a copy's is the copy's


def _to_own(dtype: torch.dtype, module: nn.Module, arguments: Any, keywords: Any) -> tuple[Any, Any]:
    kept = {name: value for name, value in keywords.items() if IN_FP32.search(name)}
    return _cast(dtype, arguments, 2), {**_cast(dtype, keywords, 2), **kept}


def _call_in_own(name: str, dtype: torch.dtype, model: nn.Module, *arguments: Any, **keywords: Any) -> Any:
    own = torch.float32 if getattr(model, "dtype", None) == torch.float32 else dtype
    return getattr(type(model), name)(model, *_cast(own, arguments, 2), **_cast(own, keywords, 2))


def _cast(dtype: torch.dtype, values: Any, dimensions: int = 0) -> Any:
    """`values` with every floating-point tensor in them in `dtype`, if it has as many dimensions."""

    def cast(value: Tensor) -> Tensor:
        return value.to(dtype) if value.is_floating_point() and value.dim() >= dimensions else value

    return tree_map_only(Tensor, cast, values)


def _to_fp32(module: nn.Module, arguments: Any, keywords: Any) -> tuple[Any, Any]:
    return _cast(torch.float32, arguments), _cast(torch.float32, keywords)


def _to_compute_dtype(dtype: torch.dtype, module: nn.Module, arguments: Any, output: Any) -> Any:
    return _cast(dtype, output)
