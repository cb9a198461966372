"""Compiled loops: read without their compiler, made again where they are missing, and who quantizes meanwhile."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qexp.offloading.payload import leaves
from qexp.quantizers.cpu_kernels import loops, readiness
from tests.backends import same_bytes
from tests.loading.toys import Toy, load_toy, random_state, save_state, settings
from tests.products import representatives

BACKENDS = (
    *("bitsandbytes", "bitsandbytes_fp4", "bitsandbytes_nf4_dq", "bitsandbytes_int8", "torchao", "quanto"),
    *("gguf_q4_0", "gguf", "packed_uint4"),
)


@contextmanager
def on_their_way() -> Iterator[None]:
    """Loops that another thread compiles for all of the block."""
    readiness.compiling.append(-1)
    try:
        yield
    finally:
        readiness.compiling.clear()


def cases() -> list[Any]:
    """By default a dtype for each backend, and all for packed weights, which have no library to agree with."""
    dtypes = ["bfloat16", "float32", "float16"]
    alike = ("bitsandbytes_fp4", "bitsandbytes_nf4_dq", "gguf_q4_0")  # loops that others call, too
    kept = [(backend, dtypes[number % 3]) for number, backend in enumerate(BACKENDS) if backend not in alike]
    return representatives(product(BACKENDS, dtypes), [*kept, *(("packed_uint4", dtype) for dtype in dtypes)])


@pytest.mark.parametrize(("backend", "dtype"), cases())
def test_bytes_do_not_depend_on_who_quantized(
    backend: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_state(tmp_path, random_state(Toy))
    asked = settings(backend, compute_dtype=dtype)
    expected = load_toy(folder, asked).model
    called = count_loops(monkeypatch)
    with on_their_way():
        found = load_toy(folder, asked).model
    assert (not called) == (not backend.startswith("packed"))  # these have no library
    for (name, one), other in zip(found.named_parameters(), expected.parameters(), strict=True):
        for leaf, expected_leaf in zip(leaves(one), leaves(other), strict=True):
            assert same_bytes(leaf, expected_leaf), name


def count_loops(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the compiled loops that are called from now on."""
    from qexp.quantizers.cpu_kernels import blockwise_4bit, kernels
    from qexp.quantizers.gguf_blocks import kernels as gguf
    from qexp.quantizers.packed import kernels as packed

    called: list[str] = []

    def watch(module: object, name: str) -> None:
        original: Callable[..., object] = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *arguments: (called.append(name), original(*arguments))[1])

    for module, names in (
        (kernels, ("absmax", "nearest_4bit", "llm_int8_rows", "torchao_int8_rows", "quanto_int8_rows")),
        (gguf, ("encode", "decode")),
        (packed, ("encode_integers", "encode_floats")),
    ):
        for name in names:
            watch(module, name)
    assert blockwise_4bit.kernels is kernels
    return called


@loops.loop
def double(values: Any, factor: Any, out: Any) -> None:
    for at in range(values.shape[0]):
        out[at] = values[at] * factor


@loops.loop
def allocate(out: Any) -> None:
    out[:] = np.arange(out.shape[0])


@loops.loop
def draw(out: Any) -> None:
    for at in range(out.shape[0]):
        out[at] = np.random.random()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where machine code is kept; this process has read none, and has none there."""
    monkeypatch.setenv(loops.FOLDER_VARIABLE, str(tmp_path / "loops"))
    monkeypatch.setattr(double, "_calls", {})
    return tmp_path / "loops"


def doubled(count: int = 3) -> list[float]:
    out = np.zeros(count, np.float32)
    double(np.arange(count, dtype=np.float32), np.float32(2), out)
    return list(out)


def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the loops that are compiled from now on; their code is that of `double`, compiled once."""
    from qexp.quantizers.cpu_kernels import compiler

    names: list[str] = []
    code = compiled_double()
    monkeypatch.setattr(compiler, "compile_loop", lambda function, _: (names.append(function.__name__), code)[1])
    return names


@cache
def compiled_double() -> bytes:
    from qexp.quantizers.cpu_kernels.compiler import compile_loop

    return compile_loop(double.function, ("float32_1", "float32", "float32_1"))


def test_code_is_compiled_once_and_read_by_the_next_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = compiled(monkeypatch)
    assert doubled() == [0, 2, 4]
    double._calls.clear()  # as in another process
    assert doubled(5) == [0, 2, 4, 6, 8]
    assert names == ["double"]
    assert [path.name for path in folder.rglob("*.o")] == ["double-float32_1-float32-float32_1.o"]


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:-1] + b"!", lambda _: b""])
def test_damaged_code_is_made_again(
    damage: Callable[[bytes], bytes], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = compiled(monkeypatch)
    doubled()
    (file,) = folder.rglob("*.o")
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    double._calls.clear()
    assert doubled() == [0, 2, 4] and names == ["double"] * 2
    assert file.read_bytes() == whole


def test_code_stays_in_memory_where_it_cannot_be_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = compiled(monkeypatch)
    folder.write_text("a file", encoding="utf-8")
    assert doubled() == [0, 2, 4] == doubled() and names == ["double"]


def test_folders_are_the_package_then_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(loops.FOLDER_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert loops._code_folders() == (Path(str(loops.__file__)).parent / "__pycache__", tmp_path / "qexp")


def test_code_depends_on_the_text_of_its_files() -> None:
    assert loops._code_folder(("one",)) != loops._code_folder(("two",))
    assert Path(__file__).read_text(encoding="utf-8") in double._texts  # as it was when the loop was made
    assert {path.name for path in loops._sources(double.function)} >= {"kernels.py", "compiler.py", "test_loops.py"}


def test_loop_that_needs_more_than_its_arguments_is_refused(folder: Path) -> None:
    with pytest.raises(Exception, match=r"np\.empty"):
        allocate(np.zeros(3, np.float32))
    with pytest.raises(RuntimeError, match="the loop draw calls numba_"):
        draw(np.zeros(3, np.float32))
    assert not list(folder.rglob("*.o"))


def test_array_that_is_not_contiguous_is_refused() -> None:
    with pytest.raises(ValueError, match=r"an array of strides \(8,\) is not contiguous"):
        double(np.zeros(6, np.float32)[::2], np.float32(2), np.zeros(3, np.float32))


def test_error_of_the_compiler_is_raised_where_the_loop_is_called_each_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qexp.quantizers.cpu_kernels import compiler

    def fail(*_: object) -> bytes:
        assert readiness.are_ready()  # for the thread that compiles
        raise RuntimeError("no compiler")

    monkeypatch.setattr(compiler, "compile_loop", fail)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no compiler"):
            doubled()
        assert readiness.are_ready()


def test_others_are_told_while_a_thread_compiles(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qexp.quantizers.cpu_kernels import compiler

    code, started, may_end = compiled_double(), threading.Event(), threading.Event()
    monkeypatch.setattr(compiler, "compile_loop", lambda *_: (started.set(), may_end.wait(), code)[2])
    thread = threading.Thread(target=doubled)
    thread.start()
    started.wait()
    seen = readiness.are_ready()
    may_end.set()
    thread.join()
    assert not seen and readiness.are_ready()


def test_process_forked_while_a_thread_compiles_compiles_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = compiled(monkeypatch)
    with loops._lock, on_their_way():
        child = os.fork()
        if child == 0:
            right = readiness.are_ready() and doubled() == [0, 2, 4] and names == ["double"]
            os._exit(0 if right else 1)
        for _ in range(1000):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                break
            time.sleep(0.01)
        else:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail("the child waits for a thread that it has not")
    assert status == 0


def test_quantizing_imports_no_compiler() -> None:
    code = (
        "import sys, torch\n"
        "from qexp.quantizers.compile_kernels import compile_all\n"
        "compile_all()\n"  # reads what this session's set-up has compiled, or compiles it
        "print('numba' in sys.modules)\n"
    )
    for _ in range(2):  # the second one reads
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        if found.stdout.split() == ["False"]:
            return
    raise AssertionError(found.stdout + found.stderr)
