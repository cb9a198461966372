"""Backends on the pipeline's threads: what several of them quantize at once is what one would have quantized."""

import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from qexp.offloading.payload import leaves
from qexp.quantizers.base import load_quantizer
from qexp.quantizers.quanto_support import library
from qexp.quantizers.rows import WeightSpec
from tests.backends import CPU, EVERY_WAY_TO_QUANTIZE, backend_config, can_hold, same_bytes

SHAPES = [(16, 64), (48, 128), (7, 96), (64, 130), (1, 256), (9, 256), (33, 34)]


@pytest.fixture
def restless() -> Iterator[None]:
    """Threads take turns as often as the interpreter lets them."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("restless")
@pytest.mark.parametrize("backend", EVERY_WAY_TO_QUANTIZE)
def test_quantizing_on_several_threads_at_once(backend: str) -> None:
    quantizer = load_quantizer(backend_config(backend))
    quantizer.validate_environment(CPU)
    generator = torch.Generator().manual_seed(0)
    specs = [WeightSpec(str(shape), shape, torch.bfloat16) for shape in SHAPES]
    specs = [spec for spec in specs if can_hold(quantizer, spec)]
    weights = [torch.randn(spec.shape, generator=generator) for spec in specs]
    assert len(specs) > 1

    def quantize(number: int) -> list[Tensor]:
        torch.set_num_threads(1)
        with torch.no_grad():
            chosen = number % len(specs)
            return leaves(quantizer.create_quantized_param(specs[chosen], [weights[chosen]], {}, CPU))

    expected = [quantize(number) for number in range(len(specs))]
    with ThreadPoolExecutor(4) as pool:
        for number, found in enumerate(pool.map(quantize, range(120))):
            alike = zip(found, expected[number % len(specs)], strict=True)
            assert all(same_bytes(a, b) for a, b in alike), specs[number % len(specs)]


def test_quanto_parses_shapes_on_one_thread_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.11 now and then raises SystemError from `ast.literal_eval` when other threads are in it."""
    load_quantizer(backend_config("quanto")).is_quantized(torch.nn.Linear(1, 1))  # imports the library
    inside, most, calls = 0, 0, 0

    def slow(text: str) -> Any:
        nonlocal inside, most, calls
        inside, calls = inside + 1, calls + 1
        most = max(most, inside)
        time.sleep(0.001)
        inside -= 1
        return [64, 12]

    monkeypatch.setattr(library, "ast", SimpleNamespace(literal_eval=slow))
    kinds = ["weights.qbytes", "weights.qbits", "packed", "weights.tinygemm.packed", "weights.tinygemm.qbits"]
    modules: list[Any] = [sys.modules[f"optimum.quanto.tensor.{kind}"] for kind in kinds]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda number: modules[number % 5].ast.literal_eval("[64, 12]"), range(40)))
    assert found == [[64, 12]] * 40
    assert (calls, most) == (40, 1)
