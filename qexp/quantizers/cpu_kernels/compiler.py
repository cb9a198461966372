"""Compile a loop to machine code of this processor, by Numba and LLVM. Imported where a loop's file is missing."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numba
from llvmlite import binding as llvm
from numba import types
from numba.extending import lower_builtin, register_jitable, type_callable

from qexp.quantizers.cpu_kernels.marks import SYMBOL, inlined_functions, use_widest_vectors

OPTIONS = {"nogil": True, "error_model": "numpy"}
C_FUNCTIONS = {"memcpy", "memmove", "memset"}  # which LLVM may call in place of a loop


def compile_loop(function: Callable[..., None], kinds: tuple[str, ...]) -> bytes:
    """Return an object file with the function as `SYMBOL`; kinds: as in `loops.py`.

    Its arguments are what Numba passes on: addresses for a result and an error, then numbers, and arrays as their
    owner, parent, size, item size, address, shape and strides.

    Raises: numba's errors; RuntimeError if Numba is switched off, or if the code calls a function that is not in it.
    """
    code: bytes = describe_machine().emit_object(compile_module(function, kinds))
    return code


def compile_module(function: Callable[..., None], kinds: tuple[str, ...]) -> Any:
    """Return LLVM's module of the function, for this processor, with all that it calls in it."""
    if numba.config.DISABLE_JIT:
        raise RuntimeError("NUMBA_DISABLE_JIT is set, and a loop of qexp is not compiled yet; unset it")
    for one in inlined_functions:
        _make_callable(one)
    dispatcher = numba.njit(function, no_cpython_wrapper=True, no_cfunc_wrapper=True, _nrt=False, **OPTIONS)
    signature = tuple(_type(kind) for kind in kinds)
    dispatcher.compile(signature)
    module = llvm.parse_assembly(dispatcher.inspect_llvm(signature))
    name = dispatcher.overloads[signature].fndesc.llvm_func_name
    for other in module.functions:
        if not other.is_declaration and other.name != name:
            other.linkage = "internal"  # so that it goes where nothing calls it
    module.get_function(name).name = SYMBOL
    passes = llvm.create_new_module_pass_manager()
    passes.add_global_dead_code_eliminate_pass()
    passes.run(module, llvm.create_pass_builder(describe_machine(), llvm.create_pipeline_tuning_options(speed_level=0)))
    called = {other.name for other in module.functions if other.is_declaration and not other.name.startswith("llvm.")}
    if called - C_FUNCTIONS:
        raise RuntimeError(f"the loop {function.__name__} calls {', '.join(sorted(called - C_FUNCTIONS))}")
    return module


def describe_machine() -> Any:
    target = llvm.Target.from_default_triple()
    features = llvm.get_host_cpu_features().flatten()
    return target.create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=features, opt=3, reloc="pic", codemodel="jitdefault"
    )


def _type(kind: str) -> Any:
    name, _, dimensions = kind.partition("_")
    scalar = getattr(types, name)
    return types.Array(scalar, int(dimensions), "C") if dimensions else scalar


@cache
def _make_callable(function: Callable[..., Any]) -> None:
    register_jitable(**OPTIONS)(function)


@type_callable(use_widest_vectors)
def _type_of_call(_: Any) -> Any:
    return lambda: types.none


@lower_builtin(use_widest_vectors)
def _set_vector_width(context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
    set.add(builder.function.attributes, '"prefer-vector-width"="512"')  # its own `add` knows no quoted attributes
    return context.get_dummy_value()
