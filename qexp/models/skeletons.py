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

import torch
from torch import Tensor, nn

INITIALIZERS = tuple(name for name in vars(nn.init) if name.endswith("_") and not name.startswith("_"))

COMPUTED = "_qexp_computed"  # mark of a parameter that a class computes, and a file need not have
COMPUTE_DTYPE: ContextVar[torch.dtype | None] = ContextVar("COMPUTE_DTYPE", default=None)


@contextmanager
def on_meta(compute_dtype: torch.dtype | None = None) -> Iterator[None]:
    """Create parameters in the block on the meta device; buffers, which may be computed, are created as ever.

    compute_dtype: what the network is built for; None if it is only looked at.
    """
    from accelerate import init_empty_weights

    token = COMPUTE_DTYPE.set(compute_dtype)
    try:
        with without_initialization(), init_empty_weights(include_buffers=False):
            yield
    finally:
        COMPUTE_DTYPE.reset(token)


@contextmanager
def as_from_pretrained() -> Iterator[None]:
    """Make the compute dtype torch's default dtype, as diffusers and transformers do while they build a network.

    Buffers that no file holds (position tables, masks, scales of embeddings) are computed in the default dtype where
    the class names none: in fp32 they would meet activations in 16 bits, which some networks cannot take.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(COMPUTE_DTYPE.get() or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def without_initialization() -> Iterator[None]:
    """Make `torch.nn.init` skip tensors on the meta device; others are filled as ever."""
    originals = {name: getattr(nn.init, name) for name in INITIALIZERS}
    try:
        for name, original in originals.items():
            setattr(nn.init, name, _but_for_meta(original))
        yield
    finally:
        for name, original in originals.items():
            setattr(nn.init, name, original)


def _but_for_meta(initialize: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(initialize)
    def initialize_real(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        return tensor if tensor.is_meta or tensor.numel() == 0 else initialize(tensor, *arguments, **options)

    return initialize_real
