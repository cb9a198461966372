"""Every option of conf/backend × every way to offload: the resident model's output, and on the device what has to be.

For each backend a model is loaded straight onto the device; its answers are what every offloaded one has to give, bit
for bit, in three forwards. Then it is offloaded in one way after the other, from the device and from the host in turn,
and given back. Rules, in the third forward (the first learns the order):

* device bytes at rest are the ring and what has no forward of its own, and at the peak the activations beside them;
* bytes from host to device are the payload, in at most one copy a group; nothing comes back;
* the host waits no more often than it does for the resident model (but for disk and staging buffers, which it fills).
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from gpu_checks.accelerator import Accelerator
from gpu_checks.checks import Checks, Numbers, Outcome
from gpu_checks.subjects import batches, load_net
from gpu_checks.transfers import Transfers
from qexp.config.offload import STREAMED, OffloadConfig
from qexp.offloading.payload import flatten, module_nbytes, sites
from qexp.offloading.strategies import Offload, apply_offload

GROUP = "offload"
FORWARDS = 3
SLACK_BYTES = 64 << 10  # the allocator hands out multiples of 512 bytes
GIB = 2**30


@dataclass(frozen=True)
class Way:
    name: str
    config: OffloadConfig


def ways(*, streams: bool) -> Iterator[Way]:
    """Strategy × place × pinned or staged × no stream or depth."""
    yield Way("none", OffloadConfig())
    places: list[tuple[str, dict[str, Any]]] = [
        ("cpu pinned", {"to": "cpu"}),
        ("cpu low_cpu_mem", {"to": "cpu", "low_cpu_mem": True}),
        ("disk", {"to": "disk"}),
    ]
    for strategy, (place, options) in itertools.product(("model", "sequential", *STREAMED), places):
        if strategy not in STREAMED:
            yield Way(f"{strategy} {place}", OffloadConfig(strategy, **options))
            continue
        yield Way(f"{strategy} {place} no stream", OffloadConfig(strategy, use_stream=False, **options))
        for depth in (2, 3, 4) if streams else ():
            config = OffloadConfig(strategy, use_stream=True, prefetch_depth=depth, **options)
            yield Way(f"{strategy} {place} stream depth {depth}", config)


def move(model: nn.Module, device: torch.device) -> None:
    """Move all weights through their plain tensors, byte for byte: `.to()` of some quantized weights repacks them."""
    places = [site for module in model.modules() for site in sites(module)]
    parts, rebuild = flatten([store[name] for store, name in places])
    moved: dict[Any, Tensor] = {}
    for part in parts:  # LLM.int8 weights are data and attribute at once
        moved.setdefault((part.data_ptr(), part.shape, part.dtype), part.to(device))
    values = rebuild([moved[part.data_ptr(), part.shape, part.dtype] for part in parts])
    for (store, name), value in zip(places, values, strict=True):
        store[name] = value


@dataclass
class Run:
    outputs: list[Tensor]
    peak_bytes: int  # allocated, at the most, in the last forward
    transfers: Transfers  # in the last forward
    waits: int


def run(model: nn.Module, inputs: list[Tensor], accelerator: Accelerator) -> Run:
    outputs, transfers = [], Transfers()
    with torch.no_grad():
        for batch in inputs[:-1]:
            outputs.append(model(batch).cpu())
        with accelerator.peak() as peak, accelerator.host_waits() as waits, transfers:
            last = model(inputs[-1])
        peak_bytes = peak()
    return Run([*outputs, last.cpu()], peak_bytes, transfers, len(waits))


class Subject:
    """A backend's model, its answers as the resident model, and what the device holds without it."""

    def __init__(self, option: str, checkpoint: Path, accelerator: Accelerator, dtype: torch.dtype, width: int) -> None:
        gc.collect()
        gc.freeze()  # the libraries, which are there to stay: what comes now is collected in no time
        self.accelerator = accelerator
        self.inputs = [batch.to(accelerator.device) for batch in batches(width, FORWARDS, dtype)]
        self.model: nn.Module = load_net(option, checkpoint, accelerator.device, dtype).model
        run(self.model, self.inputs, accelerator)  # workspaces of libraries, tables of backends
        self.nbytes = module_nbytes(self.model)
        accelerator.settle()
        self.resident = run(self.model, self.inputs, accelerator)
        move(self.model, torch.device("cpu"))
        accelerator.settle()
        self.empty_bytes = accelerator.allocated_bytes()
        self.activation_bytes = self.resident.peak_bytes - self.empty_bytes - self.nbytes

    def check(self, way: Way, store: Path, *, starts_on_device: bool) -> Outcome:
        device = self.accelerator.device
        if starts_on_device or way.config.strategy == "none":
            move(self.model, device)
        config = way.config.resolved(device.type)
        handle = apply_offload(self.model, config, device=device, block_lists=["blocks"], store=store)
        self.accelerator.settle()
        rest_bytes = self.accelerator.allocated_bytes() - self.empty_bytes
        numbers = self._numbers(handle, run(self.model, self.inputs, self.accelerator), rest_bytes)
        broken = self._broken(config, numbers)
        handle.remove()
        del handle
        if any(store.glob("*")):
            broken.append("files are left behind")
        move(self.model, torch.device("cpu"))
        self.accelerator.settle()
        return numbers, broken

    def _numbers(self, handle: Offload, found: Run, rest_bytes: int) -> Numbers:
        resident, statistics = self.resident, handle.statistics()
        return {
            "equal_forwards": sum(map(torch.equal, found.outputs, resident.outputs)),
            "weights_bytes": self.nbytes,
            "groups": len(handle.groups),
            "payload_bytes": sum(group.nbytes for group in handle.groups),
            "outside_groups_bytes": round(statistics["offload/resident_gib"] * GIB),
            "ring_bytes": round(statistics["offload/ring_gib"] * GIB),
            "own_at_rest_device_bytes": round(statistics["offload/at_rest_device_gib"] * GIB),
            "at_rest_device_bytes": rest_bytes,
            "peak_device_bytes": found.peak_bytes - self.empty_bytes,
            "activation_bytes": self.activation_bytes,
            "h2d_bytes": found.transfers.h2d_bytes - resident.transfers.h2d_bytes,
            "h2d_copies": found.transfers.h2d_copies - resident.transfers.h2d_copies,
            "d2h_bytes": found.transfers.d2h_bytes - resident.transfers.d2h_bytes,
            "host_waits": found.waits - resident.waits,
        }

    def _broken(self, config: OffloadConfig, numbers: Numbers) -> list[str]:
        """Return the rules that do not hold, with the numbers that say so."""
        n = SimpleNamespace(**numbers)
        moves = n.payload_bytes if config.strategy not in ("none", "model") else 0  # a component stays, once here
        copies = n.groups if moves else 0
        rest = n.outside_groups_bytes + (0 if config.strategy == "model" else n.ring_bytes) + SLACK_BYTES
        most = n.outside_groups_bytes + n.ring_bytes + self.activation_bytes + SLACK_BYTES
        own = n.own_at_rest_device_bytes if config.strategy != "none" else 0
        waits_allowed = config.to == "disk" or config.low_cpu_mem or not config.non_blocking
        missed = FORWARDS - n.equal_forwards
        rules = [
            (missed == 0, f"{missed} of {FORWARDS} outputs are not the resident model's"),
            (n.d2h_bytes <= 0, f"{n.d2h_bytes} bytes came back"),
            (n.host_waits <= 0 or waits_allowed, f"the host waited {n.host_waits} times more"),
        ]
        if self.accelerator.module is not None:
            at_rest, peak = n.at_rest_device_bytes, n.peak_device_bytes
            rules += [
                (at_rest <= rest, f"at rest {at_rest} bytes are on the device, {rest} are allowed"),
                (own == 0, f"by its own account {own} bytes are at rest on the device"),
                (peak <= most, f"at the peak {peak} bytes are on the device, {most} are allowed"),
                (n.h2d_bytes == moves, f"{n.h2d_bytes} bytes went to the device, the payload has {moves}"),
                (n.h2d_copies <= copies, f"{n.h2d_copies} copies for {copies} groups"),
            ]
        return [text for holds, text in rules if not holds]


def check_all(
    checks: Checks, accelerator: Accelerator, folder: Path, options: list[str], *, small: bool, dtype: torch.dtype
) -> None:
    """All rows of the group. A subject is made for the first way that is not done, and made anew after a failure."""
    width = 64 if small else 512
    for number, option in enumerate(options):
        subject: Subject | None = None
        for index, way in enumerate(ways(streams=accelerator.has_streams)):
            starts_on_device = (number + index) % 2 == 0
            name = f"{option} · {way.name} · from {'device' if starts_on_device else 'host'}"

            def check(way: Way = way, starts_on_device: bool = starts_on_device, option: str = option) -> Outcome:
                nonlocal subject
                if subject is None:
                    subject = Subject(option, folder / "net", accelerator, dtype, width)
                return subject.check(way, folder / "store", starts_on_device=starts_on_device)

            row = checks.run(GROUP, name, check)
            if row is not None and row.status != "passed":
                subject = None
        subject = None
        accelerator.settle()
