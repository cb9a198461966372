"""Every kind of weight, every way to offload it: the output of the resident model, and only the payload moved.

The ways cover every pair of strategy, place, stream, depth and start. Kinds that differ in how their bytes are held
take all of them, the others every strategy; two kinds take all combinations. The default run takes fewer: `cases`.
"""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from qexp.config.offload import STRATEGIES, STREAMED, OffloadConfig
from tests.backends import REPRESENTATIVES
from tests.offloading import model_zoo as zoo
from tests.offloading.on_fake_device.harness import FORWARDS, compare, problems

ON_DEVICE, ON_HOST = True, False
Way = tuple[OffloadConfig, bool]
WAYS: dict[str, Way] = {
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


def every_way() -> dict[str, Way]:
    """Strategy × place × stream and depth × start, without exception."""
    ways = {}
    for strategy, to, starts_on_device in itertools.product(STRATEGIES[1:], ("cpu", "disk"), (ON_HOST, ON_DEVICE)):
        for depth in (None, 2, 3, 4) if strategy in STREAMED else (None,):
            options: dict[str, Any] = {"use_stream": False} if depth is None else {"prefetch_depth": depth}
            name = f"{strategy} {to} {depth or 'no stream'} {'device' if starts_on_device else 'host'}"
            ways[name] = (OffloadConfig(strategy, to, **(options if strategy in STREAMED else {})), starts_on_device)
    return ways


# every option of conf/backend as a load makes it, and what no option makes: other dtypes, classes and versions
KINDS = [*zoo.LOADED, "bf16", "bitsandbytes_nf4_nested", "bitsandbytes_int8", "torchao_intx", "gguf_q8_0"]
ALL_WAYS = ("none", "bitsandbytes_nf4_dq", "bitsandbytes_int8", "torchao", "quanto_int4", "gguf", "packed_uint4")
EVERY_COMBINATION = ("fp32", "conf/torchao")


def ways_of(number: int) -> dict[str, Way]:
    """Every strategy once: leaf and block in ways that differ from kind to kind."""
    alike = [[name for name, (config, _) in WAYS.items() if config.strategy == strategy] for strategy in STRATEGIES[1:]]
    return {name: WAYS[name] for names in alike for name in [names[number % len(names)]]}


def cases() -> list[Any]:
    """By default one kind takes all ways; those that differ in how their bytes are held take two strategies each."""
    found = {}
    held_apart = [kind for kind in KINDS if kind.removeprefix("conf/") in REPRESENTATIVES]
    for number, kind in enumerate(KINDS):
        of_strategies = ways_of(number)
        pair = [*of_strategies][held_apart.index(kind) % 2 :: 2] if kind in held_apart else []
        for name, way in (WAYS if kind.removeprefix("conf/") in ALL_WAYS else of_strategies).items():
            found[kind, name] = (way, kind == "conf/torchao" or name in pair)
    for kind in EVERY_COMBINATION:
        for name, way in every_way().items():
            found.setdefault((kind, name), (way, False))
    return [
        pytest.param(kind, way, id=f"{kind}-{name}", marks=() if kept else pytest.mark.exhaustive)
        for (kind, name), (way, kept) in found.items()
    ]


@pytest.mark.parametrize(("kind", "way"), cases())
def test_offloaded_is_resident(kind: str, way: Way, tmp_path: Path) -> None:
    config, starts_on_device = way
    pair = compare(kind, config, tmp_path, starts_on_device=starts_on_device)
    found = problems(pair, config)
    if kind == "conf/bitsandbytes_int8":  # the library keeps the outlier columns of the last forward in its state
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
