"""The library, imported without what it would fetch, compile and say.

On CPUs with AVX512 it dequantizes blocks of 2048 weights and more in PyTorch, compiled anew by `torch.compile` for each
shape of a weight: seconds each. The same lines are run as they are written.
"""

from __future__ import annotations

import importlib
import logging
import sys
from functools import cache
from typing import Any

from qexp.quantizers import base


@cache
def library() -> Any:
    """bitsandbytes, imported without its look-up of kernels on a hub."""
    absent = object()
    kernels = sys.modules.get("kernels", absent)
    sys.modules["kernels"] = None  # type: ignore[assignment]  # an import of it now raises ImportError
    try:
        with base.quiet():
            import bitsandbytes
        # it would say at every call of every layer that inputs are cast to fp16
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        general: Any = importlib.import_module("bitsandbytes.backends.default.ops")
        compiled = general._dequantize_4bit_compute
        general._dequantize_4bit_compute = getattr(compiled, "__wrapped__", compiled)
    finally:
        if kernels is absent:
            del sys.modules["kernels"]
        else:
            sys.modules["kernels"] = kernels  # type: ignore[assignment]
    return bitsandbytes
