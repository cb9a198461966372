"""Networks whose parameters have shapes and dtypes, but no memory, built without the time that filling them would take.

A constructor draws initial values for every parameter it makes. On the meta device that draws nothing, but still runs
a Python implementation of each operation: half of the time to build a network of thousands of layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import Tensor, nn

INITIALIZERS = tuple(name for name in vars(nn.init) if name.endswith("_") and not name.startswith("_"))


@contextmanager
def on_meta() -> Iterator[None]:
    """Parameters that are made in the block land on the meta device; buffers, which may be computed, do not."""
    from accelerate import init_empty_weights

    with without_initialization(), init_empty_weights(include_buffers=False):
        yield


@contextmanager
def without_initialization() -> Iterator[None]:
    """The functions of `torch.nn.init` leave tensors on the meta device alone; others are filled as ever."""
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
        return tensor if tensor.is_meta else initialize(tensor, *arguments, **options)

    return initialize_real
