"""Import bitsandbytes without its downloads, compilation and warnings, and with two fixes.

On CPUs with AVX512 it dequantizes blocks of 2048 weights and more in PyTorch, compiled by `torch.compile` for each
shape of a weight, which takes seconds each; here the same lines run uncompiled. Its other functions are compiled on
their first call: requesting that at import would import the compiler, which takes 4 CPU seconds (the library alone
0.05).

Fixes: its 4-bit kernel for CPUs starts a new block with every row, while its quantizers, other kernels and files
continue blocks across rows, so a weight with in_features that are not a multiple of the block size would be wrong; its
8-bit layers fail on inputs of one, four or more dimensions.
"""

from __future__ import annotations

import importlib
import logging
import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

from qexp.system.imports import once, quiet

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DEQUANTIZE_4BIT = "bitsandbytes::dequantize_4bit"


@once
def library() -> Any:
    """Import bitsandbytes without its search for kernels on a hub."""
    with quiet(), _no_kernels(), _compiled_when_called():
        import bitsandbytes
    # it would warn in every call of every layer that inputs are cast to fp16
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    general: Any = importlib.import_module("bitsandbytes.backends.default.ops")
    compiled = general._dequantize_4bit_compute
    general._dequantize_4bit_compute = getattr(compiled, "__wrapped__", compiled)
    _let_blocks_span_rows(general)
    bitsandbytes.matmul = _of_any_dimensions(bitsandbytes.matmul)
    return bitsandbytes


def _of_any_dimensions(matmul: Any) -> Any:
    """Extend the library's 8-bit product from two and three dimensions to all inputs of `nn.Linear`.

    Attention with latent keys and values calls layers with four dimensions.
    """

    @wraps(matmul)
    def flattened(A: Tensor, *arguments: Any, **options: Any) -> Tensor:
        if A.dim() in (2, 3):
            return matmul(A, *arguments, **options)
        result: Tensor = matmul(A.reshape(-1, A.shape[-1]), *arguments, **options)
        return result.reshape(*A.shape[:-1], result.shape[-1])

    return flattened


def _let_blocks_span_rows(general: Any) -> None:
    """Call the library's CPU kernel for 4-bit weights with one block per row if a block would end inside a row.

    general: the library's implementation in PyTorch, for weights whose last block is not full.
    """
    import torch

    kernel: Any = torch.library.get_kernel(DEQUANTIZE_4BIT, "CPU")
    on_cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)

    def dequantize_4bit(
        A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        numel = math.prod(shape)
        if shape[-1] % blocksize and numel % blocksize:
            code, packed = general._get_4bit_code(quant_type, A.device), A.view(torch.uint8).reshape(-1)
            return general._dequantize_4bit_compute(packed, absmax.float(), code, blocksize, shape, dtype)
        rows = (numel // blocksize, blocksize) if shape[-1] % blocksize else shape
        decoded: Tensor = kernel.call_boxed(on_cpu, A, absmax, blocksize, quant_type, rows, dtype)
        return decoded.reshape(shape)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
        torch.library.register_kernel(DEQUANTIZE_4BIT, "cpu", dequantize_4bit)


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
    """Defer torch.compile of the library's own functions, requested in the block, to their first call."""
    from unittest.mock import patch

    import torch

    compiler: Any = torch.compile

    def compile_(*arguments: Any, **options: Any) -> Any:
        (caller,) = sys._getframe(1).f_globals.get("__name__", "").split(".")[:1]
        if caller != "bitsandbytes" or len(arguments) != 1 or not callable(arguments[0]):
            return compiler(*arguments, **options)
        compiled = once(lambda: compiler(*arguments, **options))
        return lambda *inputs, **named: compiled()(*inputs, **named)

    with patch.object(torch, "compile", compile_):
        yield
