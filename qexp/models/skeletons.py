"""Networks whose parameters have shapes and dtypes, but no memory, built without the time that filling them would take.

A constructor draws initial values for every parameter it makes. On the meta device that draws nothing, but still runs
a Python implementation of each operation: half of the time to build a network of thousands of layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from qexp.models.computed_tables import Table, default_dtype

INITIALIZERS = tuple(name for name in vars(nn.init) if name.endswith("_") and not name.startswith("_"))

COMPUTED = "_qexp_computed"  # mark of a parameter that a class computes, and a file need not have
COMPUTE_DTYPE: ContextVar[torch.dtype | None] = ContextVar("COMPUTE_DTYPE", default=None)


@contextmanager
def on_meta(compute_dtype: torch.dtype | None = None) -> Iterator[None]:
    """Create parameters in the block on the meta device; buffers, which may be computed, are created as ever.

    compute_dtype: what the network is built for; None if it is only looked at.
    """
    token = COMPUTE_DTYPE.set(compute_dtype)
    try:
        with without_initialization(), _parameters_on_meta():
            yield
    finally:
        COMPUTE_DTYPE.reset(token)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Give what modules register as parameters in the block shape and dtype, but no memory.

    One that is on the meta device already stays the same object, and so tied parameters stay tied.
    """
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None and not parameter.is_meta:
            kind: Any = nn.Parameter if isinstance(parameter, Table) else type(parameter)
            moved = kind(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
            vars(moved).update(vars(parameter) if kind is type(parameter) else {})
            module._parameters[name] = moved

    with patch.object(nn.Module, "register_parameter", register_on_meta):
        yield


@contextmanager
def as_from_pretrained() -> Iterator[None]:
    """Make the compute dtype torch's default dtype, as diffusers and transformers do while they build a network.

    Buffers that no file holds (position tables, masks, scales of embeddings) are computed in the default dtype where
    the class names none: in fp32 they would meet activations in 16 bits, which some networks cannot take.
    """
    with default_dtype(COMPUTE_DTYPE.get() or torch.get_default_dtype()):
        yield


@contextmanager
def without_initialization() -> Iterator[None]:
    """Make `torch.nn.init` skip tensors on the meta device; others are filled as ever."""
    skipping: dict[str, Any] = {name: _but_for_meta(getattr(nn.init, name)) for name in INITIALIZERS}
    with patch.multiple(nn.init, **skipping):
        yield


def _but_for_meta(initialize: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(initialize)
    def initialize_real(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        return tensor if tensor.is_meta or tensor.numel() == 0 else initialize(tensor, *arguments, **options)

    return initialize_real
