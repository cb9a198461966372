"""Runs a model resident and offloaded on the same fake device, and collects what must be said about both."""

import gc
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from qexp.config.offload import OffloadConfig
from qexp.offloading.payload import flatten, leaves, module_nbytes, sites
from qexp.offloading.strategies import Offload, apply_offload
from tests.fake_device import counters
from tests.fake_device.counters import Counters, measure
from tests.offloading import model_zoo as zoo

DEVICE = torch.device("fake", 1)
GIB = 2**30
FORWARDS = 3  # the order is learned in the first; the last is in a steady state


def offload(model: nn.Module, config: OffloadConfig, store: Path | None = None) -> Offload:
    config = config.resolved(DEVICE.type)
    return apply_offload(model, config, device=DEVICE, block_lists=["blocks"], store=store)


def on_device(model: nn.Module) -> nn.Module:
    """Move all weights through their leaves: `.to()` of some quantized tensors loses parts."""
    places = [site for module in model.modules() for site in sites(module)]
    parts, rebuild = flatten([store[name] for store, name in places])
    moved: dict[tuple[int, int], Tensor] = {}  # LLM.int8 weights are data and attribute at once
    for part in parts:
        moved.setdefault((part.data_ptr(), part.nbytes), part.to(DEVICE))
    values = rebuild([moved[part.data_ptr(), part.nbytes] for part in parts])
    for (store, name), value in zip(places, values, strict=True):
        store[name] = value
    return model


def plain(model: nn.Module) -> list[Tensor]:
    """Return every plain tensor in a model, those inside of subclasses and quant states included."""
    return [leaf for module in model.modules() for store, name in sites(module) for leaf in leaves(store[name])]


def equal(some: list[Tensor], others: list[Tensor]) -> bool:
    pairs = zip(some, others, strict=True)
    return all(torch.equal(a.cpu().view(torch.uint8), b.cpu().view(torch.uint8)) for a, b in pairs if a.dim())


def live_bytes() -> int:
    return counters.total.live_bytes[DEVICE.index]


@dataclass
class Run:
    """Forwards of one model; the last of them counted, in a steady state."""

    outputs: list[Tensor] = field(default_factory=list)
    seen: Counters = field(default_factory=Counters)  # of the last forward
    races: list[str] = field(default_factory=list)  # of all
    peak_bytes: int = 0  # device memory of the last forward, without what was there before the model


def run(model: nn.Module, batches: list[Tensor], before_bytes: int) -> Run:
    result = Run()
    for batch in [batch.to(DEVICE) for batch in batches]:
        with measure() as result.seen, torch.no_grad():
            output = model(batch)
        result.races += result.seen.races
        result.peak_bytes = result.seen.peak_bytes[DEVICE.index] - before_bytes
        result.outputs.append(output.cpu())
        del output
    return result


@dataclass
class Pair:
    """The same model resident and offloaded."""

    resident: Run
    offloaded: Run
    handle: Offload
    rest_bytes: int  # device memory of the offloaded model before its first forward
    weights_bytes: int  # of the model

    @property
    def same(self) -> bool:
        return all(torch.equal(a, b) for a, b in zip(self.resident.outputs, self.offloaded.outputs, strict=True))

    @property
    def ring_bytes(self) -> int:
        return sum(slot.flat.untyped_storage().nbytes() for slot in self.handle._engine.ring.slots)

    @property
    def payload_bytes(self) -> int:
        return sum(group.nbytes for group in self.handle.groups)

    @property
    def resident_bytes(self) -> int:
        return round(self.handle.statistics()["offload/resident_gib"] * GIB)


def problems(pair: Pair, config: OffloadConfig) -> list[str]:
    """What does not hold, of what holds for every offloaded model in a steady state."""
    seen, resident = pair.offloaded.seen, pair.resident.seen
    streamed = config.use_stream is None and config.strategy in ("leaf", "block")
    moves = config.strategy != "model"  # a component that ran last is still there
    largest = max(group.nbytes for group in pair.handle.groups) + 256  # the start of a slot is aligned
    activations = pair.resident.peak_bytes - pair.weights_bytes
    at_rest = pair.resident_bytes + moves * pair.ring_bytes
    allowed = activations + pair.resident_bytes + pair.ring_bytes
    rules = {
        "the output is that of the resident model": pair.same,
        "no races": pair.offloaded.races == [],
        "nothing but ring and residents on the device": pair.rest_bytes == at_rest,
        "the same by its own account": pair.handle.statistics()["offload/at_rest_device_gib"] == 0,
        "the ring is depth × largest group": pair.ring_bytes <= (config.prefetch_depth if streamed else 1) * largest,
        "no other device memory while it runs": pair.offloaded.peak_bytes <= allowed,
        "no weights copied back": seen.d2h_bytes == resident.d2h_bytes,
        "bytes copied are the payload": seen.h2d_bytes - resident.h2d_bytes == moves * pair.payload_bytes,
        "one copy for each group": seen.h2d_copies - resident.h2d_copies == moves * len(pair.handle.groups),
        "the host never waits": seen.host_syncs == resident.host_syncs or config.to == "disk" or config.low_cpu_mem,
    }
    return [*(rule for rule, holds in rules.items() if not holds), *pair.offloaded.races[:1]]


@cache
def run_resident(kind: str, blocks: int) -> tuple[Run, int]:
    """Run a model whose weights stay on the device, once for all ways to offload it: (the run, bytes of weights)."""
    model = zoo.make(kind, depth=blocks)
    batches = zoo.inputs(model, FORWARDS)
    weights_bytes = module_nbytes(model)
    return run(on_device(model), batches, live_bytes() - weights_bytes), weights_bytes


def compare(kind: str, config: OffloadConfig, store: Path | None, *, starts_on_device: bool, blocks: int = 3) -> Pair:
    gc.collect()
    resident, weights_bytes = run_resident(kind, blocks)
    gc.collect()
    before = live_bytes()
    model = zoo.make(kind, depth=blocks)
    batches = zoo.inputs(model, FORWARDS)
    if starts_on_device:
        on_device(model)
    handle = offload(model, config, store)
    rest_bytes = live_bytes() - before
    return Pair(resident, run(model, batches, before), handle, rest_bytes, weights_bytes)
