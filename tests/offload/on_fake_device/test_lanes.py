"""Loading onto an accelerator in lanes: nothing races, little is in flight, and each rule that is broken is noticed."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qexp.loading import accelerator, reading
from qexp.loading.accelerator import LANES, PIECE_BYTES
from qexp.loading.checkpoint import open_checkpoint
from qexp.loading.dtypes import TORCH_DTYPES
from qexp.loading.pipeline import stream
from qexp.loading.plan import WorkItem
from qexp.loading.saving import save_model
from qexp.offload.payload import leaves, sites
from tests.fake_device import streams
from tests.fake_device.counters import measure
from tests.offload import model_zoo as zoo
from tests.offload.on_fake_device.harness import DEVICE, live_bytes
from tests.offload.on_fake_device.test_loading import BACKENDS, WITHOUT

KIB = 1 << 10
STORED = ["none", "bitsandbytes", "bitsandbytes_int8", "torchao", "quanto", "packed_fp6_e3w2", "gguf"]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) == before


def plain(model: nn.Module) -> list[Tensor]:
    return [leaf for module in model.modules() for store, name in sites(module) for leaf in leaves(store[name])]


def equal(some: list[Tensor], others: list[Tensor]) -> bool:
    pairs = zip(some, others, strict=True)
    return all(torch.equal(a.cpu().view(torch.uint8), b.cpu().view(torch.uint8)) for a, b in pairs if a.dim())


# Whole loads


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in WITHOUT])
def test_several_workers_make_what_one_makes_and_nothing_races(backend: str) -> None:
    batches = zoo.inputs(zoo.make("fp32"))
    one = zoo.load(backend, device=str(DEVICE))
    with measure() as seen:
        model = zoo.load(backend, device=str(DEVICE), workers=6)
        assert equal(plain(one), plain(model))
        zoo.outputs(model, [batch.to(DEVICE) for batch in batches])
        del model
        gc.collect()
    assert seen.races == []


@pytest.mark.parametrize("backend", STORED)
def test_a_saved_model_is_read_onto_the_device(backend: str, tmp_path: Path) -> None:
    saved = zoo.load(backend)
    save_model(saved, tmp_path)
    before = live_bytes()
    with measure() as seen:
        model = zoo.load_from(zoo.NetSource(tmp_path), backend, device=str(DEVICE), workers=3)
        assert {leaf.device for leaf in plain(model)} == {DEVICE}
        assert equal(plain(model), plain(saved))
        del model
        gc.collect()
    assert seen.races == []
    assert live_bytes() - before < 512


@pytest.mark.parametrize("backend", ["none", "torchao", "gguf"])
def test_a_device_without_streams(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Metal's has none: everything is in order, and waits."""
    expected = plain(zoo.load(backend, device=str(DEVICE)))
    for name in ("Stream", "current_stream"):
        monkeypatch.delattr(streams.DeviceModule, name)
    monkeypatch.setattr(reading, "PIECE_BYTES", 300)
    with measure() as seen:
        model = zoo.load(backend, device=str(DEVICE), workers=3)
    assert equal(plain(model), expected)
    assert seen.pinned_bytes == 0 and seen.races == []


def test_pinned_memory_is_given_back() -> None:
    with measure() as seen:
        model = zoo.load("torchao", device=str(DEVICE), workers=3)
        gc.collect()
    assert seen.pinned_bytes == 0
    del model


# The pipeline


def items_of(folder: Path, tensors: dict[str, Tensor]) -> list[WorkItem]:
    save_file(tensors, folder / "model.safetensors")
    entries = open_checkpoint(folder / "model.safetensors").entries.values()
    return [WorkItem(entry.name, entry, TORCH_DTYPES[entry.dtype], entry.nbytes, None) for entry in entries]


def numbers(*counts: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"t{i:03}": torch.randn(count, generator=generator) for i, count in enumerate(counts)}


def run(items: list[WorkItem], create: Callable[..., Any], workers: int = 3, **options: Any) -> list[Any]:
    options = {"in_flight_bytes": 1 << 20, "device_of": lambda item: DEVICE, **options}
    return [result for _, result in stream(items, create, workers=workers, **options)]


def twice(item: WorkItem, dense: Tensor) -> Tensor:
    assert dense.device == DEVICE
    return dense * 2


def test_tensors_arrive_whole_and_the_host_waits_once_for_each(tmp_path: Path) -> None:
    """And for a pinned buffer that is still being copied from when it is to be filled again."""
    whole_pieces = 5
    tensors = numbers(7, 0, 1000, (whole_pieces - 1) * PIECE_BYTES // 4 + 1)
    with measure() as seen:
        results = run(items_of(tmp_path, tensors), twice)
    assert all(torch.equal(found.cpu(), 2 * tensor) for found, tensor in zip(results, tensors.values(), strict=True))
    assert seen.races == []
    assert seen.h2d_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert seen.h2d_copies == 2 + whole_pieces
    assert seen.host_syncs <= len(tensors) + seen.h2d_copies
    alone = numbers((whole_pieces - 1) * PIECE_BYTES // 4 + 1)
    with measure() as seen:
        run(items_of(tmp_path, alone), twice)
    assert seen.host_syncs == whole_pieces - 2 + 1


def test_dense_tensors_in_flight_are_bounded(tmp_path: Path) -> None:
    before, most = live_bytes(), [0]

    def create(item: WorkItem, dense: Tensor) -> int:
        most[0] = max(most[0], live_bytes() - before)
        return 0

    run(items_of(tmp_path, numbers(*[4 * KIB] * 40)), create, workers=8, in_flight_bytes=40 * KIB)
    assert most == [32 * KIB]  # two tensors of 16 KiB


def test_no_more_is_made_at_a_time_than_there_are_lanes(tmp_path: Path) -> None:
    inside, most, barrier = [0], [0], threading.Barrier(LANES)

    def create(item: WorkItem, dense: Tensor) -> int:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        barrier.wait(60)
        inside[0] -= 1
        return 0

    run(items_of(tmp_path, numbers(*[10] * 4 * LANES)), create, workers=3 * LANES)
    assert most == [LANES]


def test_what_stays_on_the_cpu_is_made_there(tmp_path: Path) -> None:
    items = items_of(tmp_path, numbers(10, 20))
    devices = {items[0].target: DEVICE, items[1].target: torch.device("cpu")}
    results = run(items, lambda item, dense: dense * 1, device_of=lambda item: devices[item.target])
    assert [result.device for result in results] == list(devices.values())


def test_an_error_in_a_lane_ends_the_load_and_frees_the_lane(tmp_path: Path) -> None:
    def create(item: WorkItem, dense: Tensor) -> int:
        raise ValueError("here")

    before = live_bytes()
    with pytest.raises(ValueError, match="here"):
        run(items_of(tmp_path, numbers(*[1000] * 20)), create, workers=8)
    gc.collect()
    assert live_bytes() == before


# Rules broken on purpose


def load_and_use(folder: Path) -> tuple[list[str], bool]:
    """(races, whether the numbers are right) of a load that uses a table of the library, and lets its results go."""
    tensors = numbers(*[3 * PIECE_BYTES // 4] * 3)
    results = []
    with measure() as seen:
        table = torch.ones(1, device=DEVICE) + 1
        for _, result in stream(
            items_of(folder, tensors),
            lambda item, dense: dense * table,
            workers=1,
            in_flight_bytes=1 << 30,
            device_of=lambda item: DEVICE,
        ):
            results.append(result + 1)
            del result
            gc.collect()
    right = all(torch.equal(a.cpu(), 2 * b + 1) for a, b in zip(results, tensors.values(), strict=True))
    return seen.races, right


def never(monkeypatch: pytest.MonkeyPatch, kind: type, name: str) -> None:
    """Leave out the calls of a method that `qexp.loading.accelerator` makes."""
    method = getattr(kind, name)

    def call(self: Any, *arguments: Any) -> Any:
        if sys._getframe(1).f_globals["__name__"] != accelerator.__name__:
            return method(self, *arguments)

    monkeypatch.setattr(kind, name, call)


def test_without_a_bug_nothing_is_found(tmp_path: Path) -> None:
    assert load_and_use(tmp_path) == ([], True)


@pytest.mark.parametrize(
    ("kind", "name"),
    [(streams.Stream, "wait_stream"), (streams.Stream, "synchronize"), (torch.Tensor, "record_stream")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_leaving_out_a_wait_is_a_race(kind: type, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    never(monkeypatch, kind, name)
    assert load_and_use(tmp_path)[0]


def test_filling_a_buffer_too_early_gives_other_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    never(monkeypatch, streams.Event, "synchronize")
    assert not load_and_use(tmp_path)[1]
