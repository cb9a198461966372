"""Every kind of weight, every way to offload it: the output of the resident model, and only the payload moved.

The ways cover every pair of strategy, place, stream, depth and start.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qexp.offload.config import OffloadConfig
from tests.offload import model_zoo as zoo
from tests.offload.on_fake_device.harness import FORWARDS, compare, problems

KINDS = [
    "fp32", "bf16", "bitsandbytes_nf4", "bitsandbytes_nf4_nested", "bitsandbytes_int8", "bitsandbytes_int8_outliers",
    "torchao_int8wo", "torchao_int8dq", "torchao_float8wo_e4m3", "torchao_intx",
    "quanto_int8", "quanto_int4", "quanto_int2", "quanto_float8", "gguf_q8_0",
]  # fmt: skip
ALL_WAYS = ("fp32", "bitsandbytes_nf4_nested", "bitsandbytes_int8", "torchao_int8wo", "quanto_int4", "gguf_q8_0")
ON_DEVICE, ON_HOST = True, False
WAYS: dict[str, tuple[OffloadConfig, bool]] = {
    "leaf cpu 2 device": (OffloadConfig("leaf", "cpu", prefetch_depth=2), ON_DEVICE),
    "leaf disk 3 host": (OffloadConfig("leaf", "disk", prefetch_depth=3), ON_HOST),
    "leaf cpu 4 host": (OffloadConfig("leaf", "cpu", prefetch_depth=4), ON_HOST),
    "leaf disk no stream device": (OffloadConfig("leaf", "disk", use_stream=False), ON_DEVICE),
    "block cpu 2 host": (OffloadConfig("block", "cpu", prefetch_depth=2), ON_HOST),
    "block cpu 3 device": (OffloadConfig("block", "cpu", prefetch_depth=3), ON_DEVICE),
    "block disk 4 device": (OffloadConfig("block", "disk", prefetch_depth=4), ON_DEVICE),
    "block cpu no stream host": (OffloadConfig("block", "cpu", use_stream=False), ON_HOST),
    "sequential cpu device": (OffloadConfig("sequential", "cpu"), ON_DEVICE),
    "model cpu host": (OffloadConfig("model", "cpu"), ON_HOST),
    "leaf cpu staged device": (OffloadConfig("leaf", "cpu", low_cpu_mem=True), ON_DEVICE),
    "block cpu blocking host": (OffloadConfig("block", "cpu", 2, use_stream=False, low_cpu_mem=True), ON_HOST),
}


CROSSED = [  # kinds that differ in how their bytes are held take all ways, the others every third one
    (kind, way)
    for number, kind in enumerate(KINDS)
    for index, way in enumerate(WAYS)
    if kind in ALL_WAYS or (number + index) % 3 == 0
]


@pytest.mark.parametrize(("kind", "way"), CROSSED)
def test_offloaded_is_resident(kind: str, way: str, tmp_path: Path) -> None:
    config, starts_on_device = WAYS[way]
    pair = compare(kind, config, tmp_path, starts_on_device=starts_on_device)
    found = problems(pair, config)
    if kind == "bitsandbytes_int8_outliers":  # the library keeps the outlier columns of the last forward in its state
        found = [problem for problem in found if problem != "no other device memory while it runs"]
    assert found == []
    pair.handle.remove()
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_the_reference_is_that_of_the_cpu(kind: str) -> None:
    pair = compare(kind, OffloadConfig("leaf", "cpu"), None, starts_on_device=False)
    model = zoo.make(kind)
    on_cpu = zoo.outputs(model, zoo.inputs(model, FORWARDS))
    assert all(torch.equal(a, b) for a, b in zip(pair.resident.outputs, on_cpu, strict=True))
