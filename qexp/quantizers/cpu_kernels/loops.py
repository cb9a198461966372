"""Loops over arrays as machine code of this processor: compiled once by Numba, then read from a file without it.

To import Numba and to start it takes most of a second, which every first load of a process would wait for. LLVM alone
reads what Numba has compiled in some milliseconds. So the machine code is kept in files of this package's own, one for
each loop and types of arguments, in a folder named after the processor, the versions of the compiler, and the text of
every file that has a part in the code: the loop's own, and those of this folder.

    @loop            a function of NumPy arrays, contiguous in rows, and of int and numpy.float32. It writes its results
                     into arrays, returns nothing, allocates nothing and raises nothing. It runs without the GIL.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import cache, update_wrapper
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from qexp.errors import DiskError
from qexp.quantizers.cpu_kernels.marks import SYMBOL
from qexp.quantizers.cpu_kernels.readiness import compiling
from qexp.system.files import user_cache, write_bytes
from qexp.system.screen import say

HERE = Path(__file__).parent
FOLDER_VARIABLE = "QEXP_LOOPS"  # where machine code is kept, in place of the usual folders
NUMBERS: dict[Any, tuple[str, Any]] = {int: ("int64", ctypes.c_int64), np.float32: ("float32", ctypes.c_float)}

Kind = tuple[Any, int]  # the dtype and the dimensions of an array, or the type of a number and 0

_lock = threading.Lock()
_engines: list[Any] = []  # which own the code
_ignored = ctypes.c_void_p()  # of the result and of the error, always null


class Loop:
    """A function that is machine code when it is called."""

    def __init__(self, function: Callable[..., None]) -> None:
        update_wrapper(self, function)
        self.function = function
        self._texts = tuple(
            _source_text(path) for path in _sources(function)
        )  # now: a file may be edited before it is called
        self._calls: dict[tuple[Kind, ...], Any] = {}

    def __call__(self, *arguments: Any) -> None:
        """Raises ValueError for an array that is not contiguous."""
        flat: list[Any] = [ctypes.byref(_ignored), ctypes.byref(_ignored)]
        kinds = []
        for argument in arguments:
            if isinstance(argument, np.ndarray):
                if not argument.flags.c_contiguous:
                    raise ValueError(f"an array of strides {argument.strides} is not contiguous")
                kinds.append((argument.dtype, argument.ndim))
                flat += (None, None, argument.size, argument.itemsize, argument.__array_interface__["data"][0])
                flat += argument.shape
                flat += argument.strides
            else:
                kinds.append((type(argument), 0))
                flat.append(argument)
        status = (self._calls.get(tuple(kinds)) or self._prepare(tuple(kinds)))(*flat)
        assert status == 0, f"{self.function.__name__} raised"

    def _prepare(self, kinds: tuple[Kind, ...]) -> Any:
        with _lock:
            if kinds not in self._calls:
                self._calls[kinds] = self._read(kinds)
            return self._calls[kinds]

    def _read(self, kinds: tuple[Kind, ...]) -> Any:
        """Return the machine code for arguments of these kinds, as a function of ctypes."""
        names = tuple(f"{kind}_{dimensions}" if dimensions else NUMBERS[kind][0] for kind, dimensions in kinds)
        name = f"{self.function.__name__}-{'-'.join(names)}.o"
        folders = [folder / _code_folder(self._texts) for folder in _code_folders()]
        found = (_read_checked(folder / name) for folder in folders)
        code = next((code for code in found if code is not None), None)
        if code is None:
            code = self._compile(names)
            for folder in folders:
                with suppress(DiskError):
                    write_bytes(folder / name, _code_digest(code) + code)
                    break
        types: list[Any] = [ctypes.c_void_p, ctypes.c_void_p]
        for kind, dimensions in kinds:
            if dimensions:
                types += [ctypes.c_void_p] * 2 + [ctypes.c_ssize_t] * 2 + [ctypes.c_void_p]
                types += [ctypes.c_ssize_t] * (2 * dimensions)
            else:
                types.append(NUMBERS[kind][1])
        return ctypes.CFUNCTYPE(ctypes.c_int32, *types)(_address(code))

    def _compile(self, names: tuple[str, ...]) -> bytes:
        _say_once()
        compiling.append(threading.get_ident())
        try:
            from qexp.quantizers.cpu_kernels.compiler import compile_loop

            return compile_loop(self.function, names)
        finally:
            compiling.clear()


def _forget_other_threads() -> None:
    """Nobody compiles in a process that was forked while another thread did."""
    global _lock
    _lock = threading.Lock()
    compiling.clear()


os.register_at_fork(after_in_child=_forget_other_threads)


def loop(function: Callable[..., None]) -> Loop:
    return Loop(function)


def start_llvm() -> None:
    """Start what reads machine code: without effect, but on the memory and the time of the first call."""
    _native_target()


def _code_folders() -> tuple[Path, ...]:
    """Return where machine code is kept: beside this file, or where that cannot be written, in the user's cache."""
    if asked := os.environ.get(FOLDER_VARIABLE):
        return (Path(asked),)
    with suppress(OSError):
        return HERE / "__pycache__", user_cache()
    return (HERE / "__pycache__",)


@cache
def _source_text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _sources(function: Callable[..., Any]) -> tuple[Path, ...]:
    own = Path(str(sys.modules[function.__module__].__file__))
    return (own, *(HERE / name for name in ("kernels.py", "marks.py", "loops.py", "compiler.py")))


def _code_digest(code: bytes) -> bytes:
    return hashlib.sha256(code).digest()


def _read_checked(path: Path) -> bytes | None:
    """Return the machine code in a file, None if there is none or it is damaged: LLVM may end the process over that."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    size = hashlib.sha256().digest_size
    return data[size:] if _code_digest(data[size:]) == data[:size] else None


@cache
def _code_folder(texts: tuple[str, ...]) -> str:
    """Return a name for all that machine code depends on, but the loop."""
    llvm, _ = _native_target()
    versions = [version(package) for package in ("numba", "llvmlite", "numpy")]
    parts = [*versions, llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten(), *texts]
    return f"loops-{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}"


@cache
def _native_target() -> tuple[Any, Any]:
    """Return LLVM, started, and its description of this machine."""
    from llvmlite import binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm, llvm.Target.from_default_triple()


def _address(code: bytes) -> int:
    """Put machine code into memory that can be executed. Return where it begins."""
    llvm, target = _native_target()
    machine = target.create_target_machine(codemodel="jitdefault", jit=True)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    address: int = engine.get_function_address(SYMBOL)
    return address


@cache
def _say_once() -> None:
    say("compiling loops for this processor: some seconds, and not again where they can be kept (docs/loading.md)")
