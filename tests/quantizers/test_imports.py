"""What a backend's library brings along, in a fresh interpreter: no more than it needs, and the rest when asked."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = {"diffusers", "transformers", "torch._dynamo", "torch._inductor", "scipy", "sympy", "matplotlib"}


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("backend", ["bitsandbytes", "quanto"])
def test_the_library_comes_without_compilers_and_other_libraries(backend: str) -> None:
    code = f"from qexp.quantizers.{backend}_library import library; library(); import sys; print(*sys.modules)"
    assert HEAVY.isdisjoint(run(code).split())


def test_quanto_has_all_its_names_still() -> None:
    code = """
from qexp.quantizers.quanto_library import library
quanto = library()
from optimum.quanto import QuantizedTransformersModel
import optimum.quanto.models
names = [name for name in dir(optimum.quanto.models) if not name.startswith("_")]
assert len(names) > 5 and all(getattr(quanto, name) is getattr(optimum.quanto.models, name) for name in names)
for name in ("nonsense", "__wrapped__"):
    assert not hasattr(quanto, name)
"""
    run(code)


def test_a_library_that_is_there_already_is_the_same() -> None:
    run("""
import torch, bitsandbytes
from optimum import quanto
from qexp.quantizers import bitsandbytes_library, quanto_library
compile = torch.compile
assert bitsandbytes_library.library() is bitsandbytes and quanto_library.library() is quanto
assert torch.compile is compile
from bitsandbytes.backends.default import ops
assert not any(hasattr(getattr(ops, name), "__wrapped__") for name in bitsandbytes_library.COMPILED)
assert quanto.QuantizedTransformersModel
""")
