"""optimum-quanto, imported without what it would compile and with what it lacks.

On a CPU, PyTorch's kernel for int8 in bf16 reads rows 16 weights at a time, past their end if it must: rows of another
length are computed the general way. Unpacking int4 and int2 there would make the library compile a C++ extension into
site-packages; a few lines of PyTorch that give the same result are put in the extension's place. On a GPU it would have
nvcc compile another one for minutes, or fail: that is replaced as well, and with it go its kernels for float8 (Marlin)
and for int4 in fp16 (AWQ). Such layers multiply with the dequantized weight; int4 in bf16 has a kernel in PyTorch.

Its wrappers of whole models (`QuantizedTransformersModel` …) import transformers and diffusers, 8 CPU seconds to the
0.3 of the rest: they are imported when somebody asks for one.

The library writes shapes as text and parses them with `ast`, which Python 3.11 cannot do on several threads at once:
there is a lock.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
import threading
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

from qexp.system.imports import once, quiet

if TYPE_CHECKING:
    from torch import Tensor

# torch._weight_int8pack_mm reads 16 columns at a time, from aligned memory: other rows or addresses end in a crash
INT8_KERNEL_COLUMNS = 16
INT8_KERNEL_ALIGNMENT = 32

MODELS = "optimum.quanto.models"
OF_DIFFUSERS = ("QuantizedDiffusersModel", "QuantizedPixArtTransformer2DModel")
OF_MODELS = (  # what `optimum.quanto` has from there
    *OF_DIFFUSERS,
    "QuantizedModelForCausalLM",
    "QuantizedTransformersModel",
    "is_diffusers_available",
    "is_transformers_available",
    "models",
)


@once
def library() -> Any:
    """Return the library, with the replacements that the module's text explains."""
    with quiet():
        quanto = _without_models()
        from optimum.quanto.library.extensions.cpp import ext

    ext._lib = SimpleNamespace(unpack=unpack)
    for kind in ("cuda", "hip"):
        if extension := sys.modules.get(f"optimum.quanto.library.extensions.{kind}"):
            extension.ext._lib = SimpleNamespace(unpack=unpack)
            extensions: Any = importlib.import_module("optimum.quanto.library.extensions.extension")
            extensions._extensions.pop(f"quanto_{kind}", None)  # with it the layouts that need its other kernels
    for layout in ("tinygemm", "awq", "marlin"):  # which the library would import with the first weight of that layout
        importlib.import_module(f"optimum.quanto.tensor.weights.{layout}")
    for name, module in list(sys.modules.items()):
        if name.startswith("optimum.quanto.") and getattr(module, "ast", None) is ast:
            module.ast = SimpleNamespace(literal_eval=literal_eval)  # type: ignore[attr-defined]
    products: Any = importlib.import_module("optimum.quanto.library.qbytes_mm")
    products.qbytes_int8pack_mm = int8_product(products.qbytes_int8pack_mm, products.qbytes_mm)
    return quanto


def _without_models() -> Any:
    """Return the library, which imports the modules of `MODELS` when it is asked for what only they have."""
    is_imported = "optimum.quanto" in sys.modules
    if not is_imported:
        sys.modules[MODELS] = ModuleType(MODELS)
    try:
        quanto: Any = importlib.import_module("optimum.quanto")
    finally:
        if not is_imported:
            del sys.modules[MODELS]

    def find(name: str) -> Any:
        if name not in OF_MODELS:
            raise AttributeError(f"module {quanto.__name__!r} has no attribute {name!r}")
        models = importlib.import_module(MODELS)
        return models if name == "models" else getattr(models, name)

    if not is_imported:
        quanto.__getattr__ = find
        no_diffusers = importlib.util.find_spec("diffusers") is None
        names = [name for name in OF_MODELS if not (no_diffusers and name in OF_DIFFUSERS)]
        quanto.__all__ = [*(name for name in vars(quanto) if not name.startswith("_")), *names]
    return quanto


def int8_product(kernel: Callable[..., Tensor], general: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Multiply [..., in] by int8 [out, in] * scales [out, 1] -> [..., out], by `kernel` where it is safe."""

    def product(activations: Tensor, weights: Tensor, scales: Tensor) -> Tensor:
        aligned = all(tensor.data_ptr() % INT8_KERNEL_ALIGNMENT == 0 for tensor in (activations, weights))
        safe = aligned and weights.shape[1] % INT8_KERNEL_COLUMNS == 0
        return (kernel if safe else general)(activations, weights, scales)

    return product


_parsing = threading.RLock()


def literal_eval(text: str) -> Any:
    """`ast.literal_eval` on one thread at a time; on several it fails now and then with a SystemError."""
    with _parsing:
        return ast.literal_eval(text)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Return values of `bits` bits out of bytes: uint8 [rows, ...] -> uint8 [rows * 8 / bits, ...].

    The values of a byte lie `rows` apart: the lowest bits hold the first part of the rows.
    """
    import torch

    mask = 2**bits - 1
    return torch.cat([(packed >> shift) & mask for shift in range(0, 8, bits)])
