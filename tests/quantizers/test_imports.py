"""What a backend's library brings along, in a fresh interpreter: no more than it needs, and the rest when asked."""

import threading
import time

import pytest

from qexp.system.imports import once
from tests.fresh_process import run_python

HEAVY = {"diffusers", "transformers", "torch._dynamo", "torch._inductor", "scipy", "sympy", "matplotlib"}


def test_the_libraries_come_without_compilers_other_libraries_and_kernels_of_a_hub() -> None:
    code = """
import sys, types
trap = types.ModuleType("kernels")
trap.get_kernel = lambda *arguments, **options: sys.exit("the library asked a hub for a kernel")
sys.modules["kernels"] = trap
from qexp.quantizers.bitsandbytes_support import library as bitsandbytes_library
from qexp.quantizers.quanto_support import library as quanto_library
bitsandbytes_library.library(), quanto_library.library()
assert sys.modules["kernels"] is trap
print(*sys.modules)
"""
    found = run_python(code).split()
    assert {"bitsandbytes", "optimum.quanto"} <= {*found} and HEAVY.isdisjoint(found)


@pytest.mark.exhaustive
def test_quanto_has_all_its_names_still_also_for_a_star_import() -> None:
    run_python("""
from qexp.quantizers.quanto_support.library import library
quanto = library()
from optimum.quanto import QuantizedTransformersModel
import optimum.quanto.models
names = [name for name, value in vars(optimum.quanto.models).items() if "quanto" in getattr(value, "__module__", "")]
assert len(names) == 6 and all(getattr(quanto, name) is getattr(optimum.quanto.models, name) for name in names)
for name in ("nonsense", "__wrapped__"):
    assert not hasattr(quanto, name)
from optimum.quanto import *
assert QuantizedTransformersModel and QuantizedDiffusersModel and quantize and qint8 and models
""")


@pytest.mark.exhaustive
def test_a_star_import_without_diffusers() -> None:
    run_python("""
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "diffusers" else find(name, *rest)
from qexp.quantizers.quanto_support.library import library
library()
from optimum.quanto import *
assert QuantizedTransformersModel and not is_diffusers_available() and "QuantizedDiffusersModel" not in globals()
""")


def test_threads_that_import_at_once_leave_all_as_it_was() -> None:
    run_python("""
import sys, threading, torch
from qexp.quantizers.bitsandbytes_support import library as bitsandbytes_library
from qexp.quantizers.quanto_support import library as quanto_library
compile, barrier, found = torch.compile, threading.Barrier(4), []
def work(library):
    barrier.wait()
    found.append(library())
for library in (bitsandbytes_library.library, quanto_library.library):
    threads = [threading.Thread(target=work, args=(library,)) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
assert len(found) == 8 and len(set(found)) == 2
assert torch.compile is compile and "kernels" not in sys.modules
""")


def test_threads_that_make_a_table_at_once_get_the_same_one() -> None:
    barrier, found, made = threading.Barrier(4), list[object](), list[int]()

    @once
    def table(size: int) -> object:
        made.append(size)
        time.sleep(0.1)  # the others come meanwhile
        return object()

    def work() -> None:
        barrier.wait()
        found.append(table(3))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [3] and len(found) == 4 and len(set(found)) == 1
    assert table(4) is not table(3)


@pytest.mark.exhaustive
def test_the_library_s_other_functions_are_compiled_when_called() -> None:
    run_python("""
import torch
compiled = []
real, torch.compile = torch.compile, lambda function, **options: compiled.append(function.__name__) or function
from qexp.quantizers.bitsandbytes_support.library import library
library()
assert compiled == []
from bitsandbytes.backends.default import ops
codes, code = torch.arange(64, dtype=torch.uint8), torch.linspace(-1, 1, 256)
for _ in range(2):
    ops._dequantize_blockwise_compute(codes, torch.ones(1), code, 64, torch.float32)
assert compiled == ["_dequantize_blockwise_compute"]
""")


@pytest.mark.exhaustive
def test_a_library_that_is_there_already_is_the_same() -> None:
    run_python("""
import torch, bitsandbytes
from optimum import quanto
from qexp.quantizers.bitsandbytes_support import library as bitsandbytes_library
from qexp.quantizers.quanto_support import library as quanto_library
compile = torch.compile
assert bitsandbytes_library.library() is bitsandbytes and quanto_library.library() is quanto
assert torch.compile is compile
from bitsandbytes.backends.default import ops
assert not hasattr(ops._dequantize_4bit_compute, "__wrapped__")
assert quanto.QuantizedTransformersModel
""")
