"""Step times of a transformer of several GB: resident, offloaded here, offloaded by diffusers; and what is possible.

The weights rest in host memory. In each round, every mode is applied to a model of its own around the same weights,
warmed up, and timed over windows of steps without a pause between them; modes take turns, so that a machine that slows
down slows all of them. A step copies W - R bytes (all weights but those that stay) and computes for C, so it takes
at least

    max(C, (W - R) / BW)

with C the resident step and BW the bandwidth of copies from pinned memory, measured in every round. Modes of diffusers
are its group offloading by leaf and by block, without a stream, with one, and with `record_stream`, its fastest.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gpu_checks.accelerator import MIB, Accelerator
from gpu_checks.checks import FAILED, PASSED, SKIPPED, UNSUPPORTED, Checks, Numbers, Outcome, Row
from gpu_checks.subjects import Forward, Timed, forward_of, timed_model
from qexp.config.offload import OffloadConfig
from qexp.offloading.strategies import Offload, apply_offload

GROUP, TARGETS = "speed", "target"
WITHIN_BOUND, FASTER_THAN_PEER = 1.10, 1.3
RESIDENT, STREAMED_BLOCK, PEER = "resident", "qexp block stream", "diffusers"
GIB = 2**30
SLOW_SECONDS = 0.5  # a step that takes longer is timed twice a round, not in windows of several

Apply = Callable[[nn.Module, Timed, torch.device], Offload | None]


def resident(model: nn.Module, timed: Timed, device: torch.device) -> None:
    model.to(device)


def ours(config: OffloadConfig) -> Apply:
    def apply(model: nn.Module, timed: Timed, device: torch.device) -> Offload:
        settled = config.resolved(device.type)
        return apply_offload(model, settled, device=device, block_lists=timed.block_lists, store=None)

    return apply


def theirs(level: str, *, use_stream: bool, record_stream: bool = False) -> Apply:
    def apply(model: nn.Module, timed: Timed, device: torch.device) -> None:
        from diffusers.hooks import apply_group_offloading

        apply_group_offloading(
            model,
            device,
            offload_type=level,
            num_blocks_per_group=1 if level == "block_level" else None,
            use_stream=use_stream,
            record_stream=record_stream,
        )

    return apply


def modes(*, streams: bool) -> dict[str, Apply]:
    found: dict[str, Apply] = {RESIDENT: resident}
    for strategy in ("leaf", "block"):
        found[f"qexp {strategy} no stream"] = ours(OffloadConfig(strategy, "cpu", use_stream=False))
        found[f"{PEER} {strategy} no stream"] = theirs(f"{strategy}_level", use_stream=False)
        if streams:
            found[f"qexp {strategy} stream"] = ours(OffloadConfig(strategy, "cpu", use_stream=True))
            found[f"{PEER} {strategy} stream"] = theirs(f"{strategy}_level", use_stream=True)
            record = theirs(f"{strategy}_level", use_stream=True, record_stream=True)
            found[f"{PEER} {strategy} stream record_stream"] = record
    if streams:
        found[f"{STREAMED_BLOCK} depth 3"] = ours(OffloadConfig("block", "cpu", use_stream=True, prefetch_depth=3))
    return found


@dataclass
class Mode:
    """What was measured of a mode, round after round."""

    apply: Apply
    step_seconds: list[float] = field(default_factory=list)  # of each window, a step
    apply_seconds: list[float] = field(default_factory=list)
    numbers: Numbers = field(default_factory=dict)
    error: str = ""

    @property
    def step(self) -> float:
        return statistics.median(self.step_seconds)


class Race:
    """All modes of one model on one device."""

    def __init__(self, timed: Timed, accelerator: Accelerator, *, small: bool) -> None:
        self.timed, self.accelerator = timed, accelerator
        self.forward: Forward = forward_of(timed, accelerator.device)
        self.modes = {name: Mode(apply) for name, apply in modes(streams=accelerator.has_streams).items()}
        self.steps, self.windows = (1, 2) if small else (3, 3)
        self.copy_bytes = MIB if small else 512 * MIB
        self.bytes_per_second: list[float] = []
        self.expected: Tensor | None = None

    def measure_bandwidth(self) -> Outcome:
        rate, pinned = self.accelerator.copy_bytes_per_second(self.copy_bytes)
        self.bytes_per_second.append(rate)
        self.accelerator.settle()
        return {"gib_per_second": round(rate / GIB, 3), "pinned": pinned, "copy_bytes": self.copy_bytes}, []

    def measure(self, name: str) -> Outcome:
        """Return one round of one mode. Its output has to be the resident model's, if it is ours."""
        mode, device = self.modes[name], self.accelerator.device
        self.accelerator.settle()
        before = self.accelerator.allocated_bytes()
        model = self.timed.make()
        started = time.perf_counter()
        handle = mode.apply(model, self.timed, device)
        self.accelerator.synchronize()
        mode.apply_seconds.append(time.perf_counter() - started)
        rest_bytes = self.accelerator.allocated_bytes() - before
        self.forward(model)  # peers learn the order in the first step, too
        self.accelerator.synchronize()
        started = time.perf_counter()
        output = self.forward(model)
        self.accelerator.synchronize()
        seconds = time.perf_counter() - started
        steps, count = (1, 2) if seconds > SLOW_SECONDS else (self.steps, self.windows)
        with self.accelerator.peak() as peak:
            windows = [self._window(model, steps) for _ in range(count)]
        mode.step_seconds += windows
        if self.expected is None and name == RESIDENT:
            self.expected = output.cpu()
            if not bool(torch.isfinite(self.expected).all()):
                raise ArithmeticError("the resident model's output is not finite; nothing can be compared with it")
        equal = self.expected is not None and torch.equal(output.cpu(), self.expected)
        mode.numbers = {
            "equal": equal,
            "at_rest_device_bytes": rest_bytes,
            "peak_device_bytes": peak() - before,
            "payload_bytes": sum(group.nbytes for group in handle.groups) if handle else 0,
            "groups": len(handle.groups) if handle else 0,
        }
        numbers = {**mode.numbers, "step_ms": [round(1000 * seconds, 3) for seconds in windows]}
        return numbers, [] if equal or name.startswith(PEER) else ["the output is not the resident model's"]

    def _window(self, model: nn.Module, steps: int) -> float:
        """Return seconds a step, of steps one after the other."""
        self.accelerator.synchronize()
        started = time.perf_counter()
        for _ in range(steps):
            self.forward(model)
        self.accelerator.synchronize()
        return (time.perf_counter() - started) / steps

    def bound_seconds(self, payload_bytes: int) -> float:
        """max(C, (W - R) / BW)"""
        return max(self.modes[RESIDENT].step, payload_bytes / statistics.median(self.bytes_per_second))

    def table(self) -> list[Numbers]:
        """Return a line for every mode that ran: medians over all rounds."""
        lines = []
        for name, mode in self.modes.items():
            if not mode.step_seconds:
                continue
            line = {
                "mode": name,
                "step_ms": round(1000 * mode.step, 3),
                "fastest_ms": round(1000 * min(mode.step_seconds), 3),
                "slowest_ms": round(1000 * max(mode.step_seconds), 3),
                "times_resident": round(mode.step / self.modes[RESIDENT].step, 3),
                "windows": len(mode.step_seconds),
                "apply_seconds": round(statistics.median(mode.apply_seconds), 3),
                **mode.numbers,
            }
            if mode.numbers.get("payload_bytes"):
                bound = self.bound_seconds(mode.numbers["payload_bytes"])
                line |= {"bound_ms": round(1000 * bound, 3), "times_bound": round(mode.step / bound, 3)}
            lines.append(line)
        return lines


def targets(race: Race, *, small: bool) -> list[Row]:
    """Return the two promises about speed, each passed or failed, or skipped where what it compares did not run.

    On a device without streams, and for small models, whose times say nothing, they are unsupported.
    """
    rows = _targets(race)
    for row in rows if small or not race.accelerator.has_streams else []:
        row.status, row.message = UNSUPPORTED, "only large models on a device with streams tell"
    return rows


def _targets(race: Race) -> list[Row]:
    mode = race.modes.get(STREAMED_BLOCK)
    near = Row(TARGETS, f"streamed block offload takes at most {WITHIN_BOUND:.2f} times the bound")
    faster = Row(
        TARGETS, f"streamed block offload is at least {FASTER_THAN_PEER} times as fast as diffusers' best mode"
    )
    peers = {name: other for name, other in race.modes.items() if name.startswith(PEER) and other.step_seconds}
    if mode is None or not mode.step_seconds or not race.bytes_per_second or not race.modes[RESIDENT].step_seconds:
        near.status = faster.status = SKIPPED
        near.message = faster.message = f"no time of '{STREAMED_BLOCK}': it failed above"
        return [near, faster]
    bound = race.bound_seconds(mode.numbers["payload_bytes"])
    near.numbers = {
        "step_ms": round(1000 * mode.step, 3),
        "bound_ms": round(1000 * bound, 3),
        "resident_ms": round(1000 * race.modes[RESIDENT].step, 3),
        "gib_per_second": round(statistics.median(race.bytes_per_second) / GIB, 3),
        "ratio": round(mode.step / bound, 4),
    }
    near.status = PASSED if mode.step <= WITHIN_BOUND * bound else FAILED
    if not peers:
        faster.status, faster.message = SKIPPED, "no mode of diffusers ran"
        return [near, faster]
    best = min(peers, key=lambda name: peers[name].step)
    faster.numbers = {"best_mode": best, "best_ms": round(1000 * peers[best].step, 3)}
    faster.numbers["ratio"] = round(peers[best].step / mode.step, 4)
    faster.status = PASSED if peers[best].step >= FASTER_THAN_PEER * mode.step else FAILED
    for row in (near, faster):
        row.message = "" if row.status == PASSED else f"the ratio is {row.numbers['ratio']}"
    return [near, faster]


def check_all(
    checks: Checks,
    accelerator: Accelerator,
    *,
    small: bool,
    gib: float,
    dtype: torch.dtype,
    seconds: float,
    failed: Collection[str] = (),
) -> tuple[Numbers, list[Row]]:
    """Return all rows of the group, at least one round and as many as fit; (the table and its model, the targets).

    failed: checks of a process before this one; its rounds are not continued, and what failed in them is left out.
    """
    started, rounds = time.monotonic(), 0
    made: list[Race] = []

    def prepare() -> Outcome:
        timed = timed_model(small=small, gib=gib, device=accelerator.device, dtype=dtype)
        made.append(Race(timed, accelerator, small=small))
        gc.collect()
        gc.freeze()  # the libraries and the weights stay: models that come and go are then collected quickly
        return {"model": timed.name, "weights_bytes": timed.nbytes, "parameters": len(timed.weights)}, []

    if checks.run(GROUP, "make the model", prepare) is None:
        prepare()
    if not made:
        return {}, []
    race = made[0]
    for name, mode in race.modes.items():
        mode.error = next((check for check in failed if check.endswith(f" · {name}")), "")
    while checks.is_done(GROUP, f"round {rounds + 1} · bandwidth"):
        rounds += 1
    first, most = rounds, rounds + (1 if small else 3)
    while rounds < most and (
        rounds == first or time.monotonic() - started < seconds * (rounds - first) / (rounds - first + 1)
    ):
        rounds += 1
        checks.run(GROUP, f"round {rounds} · bandwidth", race.measure_bandwidth)
        for name, mode in race.modes.items():
            if mode.error:
                continue  # it said so in the round before
            row = checks.run(GROUP, f"round {rounds} · {name}", lambda name=name: race.measure(name))  # type: ignore[misc]
            mode.error = row.message if row is not None and row.status != PASSED else ""
            accelerator.settle()
    table = {
        "model": race.timed.name,
        "weights_bytes": sum(tensor.nbytes for tensor in race.timed.weights.values()),
        "dtype": str(dtype).removeprefix("torch."),
        "steps_a_window": race.steps,
        "rounds": rounds - first,
        "modes": race.table() if race.modes[RESIDENT].step_seconds and race.bytes_per_second else [],
    }
    return table, targets(race, small=small)
