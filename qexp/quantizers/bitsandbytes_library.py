"""The library, imported without what it would fetch, compile and say.

On CPUs with AVX512 it dequantizes blocks of 2048 weights and more in PyTorch, compiled anew by `torch.compile` for
each shape of a weight: seconds each. The same lines are run as they are written; and to ask for compiling them alone
would import the compiler, which takes 4 CPU seconds to the library's 0.05.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from qexp.quantizers import base

COMPILED = ("_dequantize_4bit_compute", "_dequantize_blockwise_compute")


@cache
def library() -> Any:
    """bitsandbytes, imported without its look-up of kernels on a hub."""
    with base.quiet(), _no_kernels(), _no_compiler():
        import bitsandbytes
    # it would say at every call of every layer that inputs are cast to fp16
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    general: Any = importlib.import_module("bitsandbytes.backends.default.ops")
    for name in COMPILED:  # somebody else may have imported it
        function = getattr(general, name)
        setattr(general, name, getattr(function, "__wrapped__", function))
    return bitsandbytes


@contextmanager
def _no_kernels() -> Iterator[None]:
    absent = object()
    kernels = sys.modules.get("kernels", absent)
    sys.modules["kernels"] = None  # type: ignore[assignment]  # an import of it now raises ImportError
    try:
        yield
    finally:
        if kernels is absent:
            del sys.modules["kernels"]
        else:
            sys.modules["kernels"] = kernels  # type: ignore[assignment]


@contextmanager
def _no_compiler() -> Iterator[None]:
    """Functions that the block asks torch to compile stay as they are."""
    import torch

    def leave(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        return function

    before, torch.compile = torch.compile, leave  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = before
