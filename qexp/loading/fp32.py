"""Where modules of several dtypes meet: what is kept in fp32 in a model, and models of one pipeline.

A model whose class lists `_keep_in_fp32_modules` casts around them in its own code (which of them are in fp32:
`interop/interfaces.py`). Modules that a user keeps in fp32 are met by activations in the compute dtype: they are cast
on the way in, and the answer on the way out. Pipelines hand the output of one model to the next, which casts it to its
own dtype. What a pipeline computes itself (times, coordinates, rotations) stays in the dtype that it was computed in.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import zip_longest
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from qexp.config.module_patterns import covering
from qexp.offloading.grouping import is_called

# Names of arguments that hold outputs of models, or latents. Coordinates and times stay in fp32: bf16 has 8 bits, which
# move a pixel by several. An unlisted name is not cast: if its dtype does not fit, torch raises an error.
ACTIVATIONS = re.compile(
    "hidden|latent|samples?$|residual|embed|pooled|projection|feats|mask|cond$|conditioning$|controls?$|context$|"
    "tokens|pixel|^image$|hint|clip_|effnet|text_bth|encoder_layers|class_labels"
)
POSITIONS = re.compile("rotary|rope|pos_embed|freqs|guidance|coord|_ids$|grid|indices|time$|timesteps?$|plucker")


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

    An autoencoder is called by its `encode` and `decode`; a pipeline may have cast it to fp32 before. Of a network's
    arguments the first is cast, and those that `ACTIVATIONS` names.
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
    names = [*inspect.signature(type(module).forward).parameters][1:]  # without self
    named = zip_longest(names[: len(arguments)], arguments, fillvalue="")  # fewer names than arguments: *args

    def cast(name: str, value: Any) -> Any:
        if isinstance(value, dict):  # added_cond_kwargs and the like
            return {key: cast(str(key), inner) for key, inner in value.items()}
        is_activation = ACTIVATIONS.search(name) and not POSITIONS.search(name)
        return _cast_tensors(dtype, value, 2) if is_activation or name in names[:1] else value

    return tuple(cast(name, value) for name, value in named), {key: cast(key, value) for key, value in keywords.items()}


def _call_in_own(name: str, dtype: torch.dtype, model: nn.Module, *arguments: Any, **keywords: Any) -> Any:
    own = torch.float32 if getattr(model, "dtype", None) == torch.float32 else dtype
    return getattr(type(model), name)(model, *_cast_tensors(own, arguments, 2), **_cast_tensors(own, keywords, 2))


def _cast_tensors(dtype: torch.dtype, values: Any, dimensions: int = 0) -> Any:
    """`values` with every floating-point tensor in them in `dtype`, if it has as many dimensions."""

    def cast(value: Tensor) -> Tensor:
        return value.to(dtype) if value.is_floating_point() and value.dim() >= dimensions else value

    return tree_map_only(Tensor, cast, values)


def _to_fp32(module: nn.Module, arguments: Any, keywords: Any) -> tuple[Any, Any]:
    return _cast_tensors(torch.float32, arguments), _cast_tensors(torch.float32, keywords)


def _to_compute_dtype(dtype: torch.dtype, module: nn.Module, arguments: Any, output: Any) -> Any:
    return _cast_tensors(dtype, output)
