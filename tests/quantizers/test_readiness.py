"""While compiled loops are on their way, the libraries' kernels make the same bytes."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from qexp.offloading.payload import leaves
from qexp.quantizers.cpu_kernels import readiness
from tests.backends import same_bytes
from tests.loading.toys import Toy, load_toy, random_state, save_state, settings
from tests.products import representatives

BACKENDS = (
    *("bitsandbytes", "bitsandbytes_fp4", "bitsandbytes_nf4_dq", "bitsandbytes_int8", "torchao", "quanto"),
    *("gguf_q4_0", "gguf", "packed_uint4"),
)


@contextmanager
def on_their_way(seconds: float | None = None) -> Iterator[None]:
    """Loops that are prepared for all of the block, or so many seconds of it."""
    prepared = threading.Event()
    readiness.prepare_beside(lambda: prepared.wait(seconds))
    try:
        yield
    finally:
        prepared.set()
        readiness.wait()


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
    with on_their_way(0.2 if backend.startswith("packed") else None):
        found = load_toy(folder, asked).model
    assert (not called) == (not backend.startswith("packed"))  # these wait
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
        (kernels, ("absmax", "nearest_4bit", "round_products", "round_quotients")),
        (gguf, ("encode", "decode")),
        (packed, ("encode_integers", "encode_floats")),
    ):
        for name in names:
            watch(module, name)
    assert blockwise_4bit.kernels is kernels
    return called


def test_thread_that_prepares_calls_the_loops_itself() -> None:
    seen: list[bool] = []
    assert readiness.are_ready()
    with on_their_way():
        assert not readiness.are_ready()
        readiness.prepare_beside(lambda: seen.append(readiness.are_ready()))
        while not seen:
            torch.zeros(1).add_(1)
    assert seen == [True] and readiness.are_ready()


def test_error_while_preparing_is_raised_where_the_loops_are_called() -> None:
    def fail() -> None:
        raise RuntimeError("no compiler")

    readiness.prepare_beside(fail)
    readiness.wait()
    assert readiness.are_ready()
