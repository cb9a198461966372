"""Modules kept in fp32 inside a model that computes in another dtype.

A model whose class lists `_keep_in_fp32_modules` casts around them in its own code (which of them are in fp32:
`models/interfaces.py`). Modules that a user keeps in fp32
are met by activations in the compute dtype: they are cast on the way in, and the answer on the way out.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from qexp.loading.patterns import covering
from qexp.offload.grouping import is_called


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


def _cast(dtype: torch.dtype, values: Any) -> Any:
    """`values` with every floating-point tensor in them in `dtype`."""
    return tree_map_only(Tensor, lambda value: value.to(dtype) if value.is_floating_point() else value, values)


def _to_fp32(module: nn.Module, arguments: Any, keywords: Any) -> tuple[Any, Any]:
    return _cast(torch.float32, arguments), _cast(torch.float32, keywords)


def _to_compute_dtype(dtype: torch.dtype, module: nn.Module, arguments: Any, output: Any) -> Any:
    return _cast(dtype, output)
