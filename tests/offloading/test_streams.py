"""The streamed engine's order of operations, on a CPU whose copies arrive late.

`LateStreams` stands for a device with a side stream. A copy there destroys its destination at once and delivers the
bytes when the compute stream waits for the event after it. Each stream has a clock; waiting for an event of the other
one tells a stream how far that one had come. A copy into memory that the compute stream may still be reading (used
at a time that the side stream has not waited for) is a race: it leaves the output right on this CPU, so it is counted.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qexp.config.offload import OffloadConfig
from qexp.offloading.engine import Engine
from qexp.offloading.group import Group, Pieces
from qexp.offloading.grouping import plan_groups
from qexp.offloading.host import Arena, aligned_buffer
from qexp.offloading.ring import Stay
from qexp.offloading.streams import Streams
from tests.offloading import model_zoo as zoo
from tests.products import representatives


@dataclass
class Event:
    on_side: bool
    time: int


class LateStreams(Streams):
    def __init__(self) -> None:
        super().__init__(torch.device("cpu"), use_stream=False)
        self.pending: list[Callable[[], None]] = []
        self.delivered = 0
        self.now = 0  # of the compute stream
        self.side_knows = 0  # time of the compute stream up to which the side stream has waited
        self.used: dict[int, int] = {}  # address in the ring -> time of its last use
        self.on_side = False
        self.races: list[str] = []

    @property
    def asynchronous(self) -> bool:
        return True

    @contextmanager
    def copying(self) -> Iterator[None]:
        self.on_side = True
        yield
        self.on_side = False

    def record(self) -> Event:
        if self.on_side:
            return Event(True, self.delivered + len(self.pending))
        self.now += 1
        return Event(False, self.now)

    def copy_waits_for(self, event: Event | None) -> None:
        if event is not None and not event.on_side:
            self.side_knows = max(self.side_knows, event.time)

    def compute_waits_for(self, event: Event | None) -> None:
        while event is not None and event.on_side and self.delivered < event.time:
            self.pending.pop(0)()
            self.delivered += 1

    def synchronize(self) -> None:
        self.compute_waits_for(Event(True, self.delivered + len(self.pending)))
        self.side_knows = self.now

    def copy(self, source: Tensor, target: Tensor) -> None:
        if self.used.get(target.data_ptr(), -1) >= self.side_knows:
            self.races.append(f"copy into a slot used at {self.used[target.data_ptr()]}, known {self.side_knows}")
        target.fill_(0xFF)  # NaN
        self.pending.append(lambda: target.copy_(source))

    def use(self, stay: Stay) -> None:
        self.used[stay.memory.data_ptr()] = self.now  # its kernels come before the next event


class LateArena(Arena):
    def __init__(self, streams: LateStreams, nbytes: int, pieces: Pieces) -> None:
        super().__init__(aligned_buffer(nbytes, torch.device("cpu")), pieces)
        self.streams = streams

    def load_into(self, target: Tensor, staging: Any, *, non_blocking: bool) -> None:
        self.streams.copy(self.flat, target)


class Watched(Engine):
    def enter(self, group: Any, index: int) -> None:
        super().enter(group, index)
        stay = self.ring.stay_of(group)
        assert stay is not None and isinstance(self.streams, LateStreams)
        self.streams.use(stay)


def stream(model: nn.Module, config: OffloadConfig, depth: int) -> tuple[Engine, LateStreams]:
    streams = LateStreams()
    groups = plan_groups(model, config, ["blocks"])
    for group in groups:
        group.pack(lambda name, nbytes, pieces: LateArena(streams, nbytes, pieces))
    engine = Watched(groups, streams, lambda name, nbytes, pieces: LateArena(streams, nbytes, pieces), depth=depth)
    engine.attach(model)
    return engine, streams


QUANTIZED = ("bitsandbytes_nf4_nested", "bitsandbytes_int8", "torchao_int8wo", "quanto_int4")


@pytest.mark.parametrize(
    ("kind", "strategy", "depth"),
    representatives(  # the order of operations depends on strategy and depth alone
        product(["fp32", *QUANTIZED], ["leaf", "block"], [1, 2, 3, 4]),
        [
            *product(["fp32"], ["leaf", "block"], [1, 2, 3, 4]),
            *zip(QUANTIZED, ["leaf", "block"] * 2, [1, 2, 3, 4], strict=True),
        ],
    ),
)
def test_streamed_output_is_bit_identical_without_races(kind: str, strategy: str, depth: int) -> None:
    config = OffloadConfig(strategy, "cpu")
    resident, model = zoo.make(kind), zoo.make(kind)
    engine, streams = stream(model, config, depth)
    for batch in zoo.inputs(model, 4):
        with torch.no_grad():
            assert torch.equal(model(batch), resident(batch))
    assert streams.races == []
    assert len(engine.ring.slots) == depth
    ahead = engine.copies - 4 * len(engine.groups)  # fetched for a step that never came
    assert 0 <= ahead <= depth - 1


def late_groups(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Gets the name of each group that is in no slot when it has to run."""
    late: list[str] = []
    choose_room = engine._room_for

    def note(group: Group, coming: Collection[Group]) -> Stay:
        late.append(group.name)
        return choose_room(group, coming)

    monkeypatch.setattr(engine, "_room_for", note)
    return late


def test_once_the_order_is_known_every_copy_starts_before_its_group_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.make("fp32")
    engine, _ = stream(model, OffloadConfig("leaf", "cpu"), 2)
    late = late_groups(engine, monkeypatch)
    batches = zoo.inputs(model, 4)
    zoo.outputs(model, batches[:2])
    assert len(late) == len(engine.groups) + 1  # the first step, and the step back to its beginning
    late.clear()
    zoo.outputs(model, batches[2:])
    assert late == []


class Repeating(zoo.Net):
    path: tuple[int, ...] = (0, 1, 0, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for index in self.path:
            x = self.blocks[index](x)
        return self.head(x)


@pytest.mark.parametrize("depth", [2, 3])
def test_repeated_and_changing_orders_are_prefetched_without_races(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    resident = Repeating().requires_grad_(False)
    model = Repeating().requires_grad_(False)
    model.load_state_dict(resident.state_dict())
    engine, streams = stream(model, OffloadConfig("block", "cpu"), depth)
    late = late_groups(engine, monkeypatch)
    for step, path in enumerate([(0, 1, 0, 2)] * 4 + [(2, 1), (2, 1), (0, 0, 1, 2), ()]):
        resident.path = model.path = path
        if step == 3:
            late.clear()
        x = torch.randn(2, zoo.WIDTH)
        assert torch.equal(model(x), resident(x))
        assert step != 3 or late == []  # block 0 is followed by 1 or by 2, depending on what came before it
    assert streams.races == []


@pytest.mark.parametrize("forgotten", ["compute_waits_for", "copy_waits_for"])
def test_a_forgotten_wait_is_caught(forgotten: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test of the tests above: without its waits the engine must fail them."""
    monkeypatch.setattr(LateStreams, forgotten, lambda self, event: None)
    resident, model = zoo.make("fp32"), zoo.make("fp32")
    _, streams = stream(model, OffloadConfig("leaf", "cpu"), 2)
    batches = zoo.inputs(model, 3)
    same = all(
        torch.equal(a, b) for a, b in zip(zoo.outputs(model, batches), zoo.outputs(resident, batches), strict=True)
    )
    assert not same if forgotten == "compute_waits_for" else streams.races
