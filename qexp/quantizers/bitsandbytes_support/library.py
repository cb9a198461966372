"""The library, imported without what it would fetch, compile and say.

On CPUs with AVX512 it dequantizes blocks of 2048 weights and more in PyTorch, compiled anew by `torch.compile` for each
shape of a weight: seconds each. The same lines are run as they are written. Its other functions are compiled when they
are first called: to ask for that while it is imported would import the compiler, 4 CPU seconds to the library's 0.05.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qexp.system.imports import once, quiet


@once
def library() -> Any:
    """bitsandbytes, imported without its look-up of kernels on a hub."""
    with quiet(), _no_kernels(), _compiled_when_called():
        import bitsandbytes
    # it would say at every call of every layer that inputs are cast to fp16
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    general: Any = importlib.import_module("bitsandbytes.backends.default.ops")
    compiled = general._dequantize_4bit_compute
    general._dequantize_4bit_compute = getattr(compiled, "__wrapped__", compiled)
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
def _compiled_when_called() -> Iterator[None]:
    """The library's own functions, and nobody else's, that the block asks torch to compile are compiled when called."""
    import torch

    compiler: Any = torch.compile

    def compile_(*arguments: Any, **options: Any) -> Any:
        (caller,) = sys._getframe(1).f_globals.get("__name__", "").split(".")[:1]
        if caller != "bitsandbytes" or len(arguments) != 1 or not callable(arguments[0]):
            return compiler(*arguments, **options)
        compiled = once(lambda: compiler(*arguments, **options))
        return lambda *inputs, **named: compiled()(*inputs, **named)

    torch.compile = compile_
    try:
        yield
    finally:
        torch.compile = compiler
