"""Loading onto an accelerator in lanes: nothing races, little is in flight, and each rule that is broken is noticed."""

import gc
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from qexp.checkpoints.checkpoint import open_checkpoint
from qexp.checkpoints.dtypes import TORCH_DTYPES
from qexp.loading.saving import save_model
from qexp.loading.streaming import file_reader, lanes
from qexp.loading.streaming.lanes import LANES, PIECE_BYTES
from qexp.loading.streaming.stream import stream
from qexp.loading.work_item import WorkItem
from qexp.models.folder import FolderSource
from qexp.quantizers.bitsandbytes_support.library import library
from tests.fake_device import streams
from tests.fake_device.counters import measure
from tests.offloading import model_zoo as zoo
from tests.offloading.on_fake_device.harness import DEVICE, equal, live_bytes, plain
from tests.products import representatives

KIB = 1 << 10
STORED = ["none", "bitsandbytes", "bitsandbytes_int8", "torchao", "quanto", "packed_fp6_e3w2", "gguf"]


pytestmark = pytest.mark.usefixtures("no_thread_is_left")


# Whole loads; test_loading.py has those that quantize


@pytest.mark.parametrize("backend", STORED)
def test_a_saved_model_is_read_onto_the_device(backend: str, tmp_path: Path) -> None:
    saved = zoo.load(backend, depth=2)
    save_model(saved, tmp_path)
    before = live_bytes()
    with measure() as seen:
        model = zoo.load_from(FolderSource(tmp_path, zoo.Net), backend, device=str(DEVICE), workers=3)
        assert {leaf.device for leaf in plain(model)} == {DEVICE}
        assert equal(plain(model), plain(saved))
        del model
        gc.collect()
    assert seen.races == []
    assert live_bytes() - before < 512


@pytest.mark.parametrize("backend", representatives(["none", "torchao", "gguf"], ["none", "torchao"]))
def test_a_device_without_streams(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Metal's has none: everything is in order, and waits."""
    expected = plain(zoo.load(backend, depth=2, device=str(DEVICE)))
    for name in ("Stream", "current_stream"):
        monkeypatch.delattr(streams.DeviceModule, name)
    monkeypatch.setattr(file_reader, "PIECE_BYTES", 300)
    with measure() as seen:
        model = zoo.load(backend, depth=2, device=str(DEVICE), workers=3)
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
    return [
        WorkItem(entry.name, entry, TORCH_DTYPES[entry.dtype], entry.nbytes, read="in_place", device=DEVICE)
        for entry in entries
    ]


def numbers(*counts: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"t{i:03}": torch.randn(count, generator=generator) for i, count in enumerate(counts)}


def run(items: list[WorkItem], create: Callable[..., Any], workers: int = 3, **options: Any) -> list[Any]:
    options = {"in_flight_bytes": 1 << 20, **options}
    return [result for _, result in stream(items, create, workers=workers, **options)]


def twice(item: WorkItem, dense: Tensor) -> Tensor:
    assert dense.device == DEVICE
    return dense * 2


def test_tensors_arrive_whole_and_the_host_waits_for_little(tmp_path: Path) -> None:
    """For each result once, and for a pinned buffer that is to be filled again while it is copied from."""
    pieces = 5
    tensors = numbers(7, 0, 1000, (pieces - 1) * PIECE_BYTES // 4 + 1)
    with measure() as seen:
        results = run(items_of(tmp_path, tensors), twice)
    assert all(torch.equal(found.cpu(), 2 * tensor) for found, tensor in zip(results, tensors.values(), strict=True))
    assert seen.races == []
    assert seen.h2d_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert seen.h2d_copies == 2 + pieces
    alone = numbers((pieces - 1) * PIECE_BYTES // 4 + 1)
    with measure() as seen:
        run(items_of(tmp_path, alone), twice)
    assert seen.host_syncs == pieces - 2 + 1


def test_what_is_kept_takes_its_own_memory_alone(tmp_path: Path) -> None:
    tensors = numbers(*[4 * KIB] * 40)
    before = live_bytes()
    with measure() as seen:
        results = run(items_of(tmp_path, tensors), lambda item, dense: dense, workers=8)
    assert seen.peak_bytes[DEVICE.index] - before == sum(tensor.nbytes for tensor in tensors.values())
    assert all(torch.equal(found.cpu(), tensor) for found, tensor in zip(results, tensors.values(), strict=True))


def test_what_is_cast_is_read_on_the_cpu_so_that_the_device_holds_the_result_alone(tmp_path: Path) -> None:
    items = [replace(item, dtype=torch.float16, read="staged") for item in items_of(tmp_path, numbers(*[4 * KIB] * 40))]
    before = live_bytes()
    with measure() as seen:
        results = run(items, lambda item, dense: dense.to(DEVICE, torch.float16), workers=8, in_flight_bytes=40 * KIB)
    assert seen.peak_bytes[DEVICE.index] - before == sum(result.nbytes for result in results)
    assert seen.races == []


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
    first, second = items_of(tmp_path, numbers(10, 20))
    results = run([first, replace(second, device=torch.device("cpu"))], lambda item, dense: dense * 1)
    assert [result.device for result in results] == [DEVICE, torch.device("cpu")]


def test_an_error_in_a_lane_ends_the_load_and_frees_the_lane(tmp_path: Path) -> None:
    def create(item: WorkItem, dense: Tensor) -> int:
        raise ValueError("here")

    before = live_bytes()
    with pytest.raises(ValueError, match="here"):
        run(items_of(tmp_path, numbers(*[1000] * 20)), create, workers=8)
    gc.collect()
    assert live_bytes() == before


def test_a_broken_device_ends_the_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every wait raises from some moment on. More workers than lanes, so that some wait for a lane."""

    def fail(self: streams.Stream) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    barrier = threading.Barrier(LANES)

    def create(item: WorkItem, dense: Tensor) -> int:
        if not barrier.broken:
            barrier.wait(60)
            barrier.abort()
        return 0

    monkeypatch.setattr(streams.Stream, "synchronize", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run(items_of(tmp_path, numbers(*[10] * 30)), create, workers=3 * LANES)


def test_two_devices_in_one_load(tmp_path: Path) -> None:
    tensors, other = numbers(*[1000] * 20), torch.device(DEVICE.type, 2)
    devices = [(DEVICE, other)[number % 2] for number in range(20)]
    items = items_of(tmp_path, tensors)
    items = [replace(item, device=device) for item, device in zip(items, devices, strict=True)]
    with measure() as seen:
        results = run(items, lambda item, dense: dense * 2, workers=6)
    assert [result.device for result in results] == devices
    assert all(torch.equal(found.cpu(), 2 * tensor) for found, tensor in zip(results, tensors.values(), strict=True))
    assert seen.races == []


@pytest.mark.parametrize("name", ["IQ2_XXS", "IQ3_XXS", "Q5_0"])
def test_tables_of_a_format_are_there_for_every_lane(name: str, tmp_path: Path) -> None:
    """Made by whichever lane needs them first."""
    from qexp.checkpoints.gguf_types import TYPES
    from qexp.quantizers.gguf_blocks.decode import decode_tensor

    count, kind = 64, TYPES[name]
    raw = torch.randint(0, 100, (count, kind.block_bytes), dtype=torch.uint8)
    expected = decode_tensor(name, raw, (count, kind.block), torch.float32)
    items = items_of(tmp_path, {f"t{number}": raw.view(torch.float16).clone() for number in range(8)})

    def create(item: WorkItem, dense: Tensor) -> Tensor:
        return decode_tensor(name, dense.view(torch.uint8), (count, kind.block), torch.float32)

    with measure() as seen:
        results = run(items, create, workers=LANES)
    assert seen.races == []
    assert all(torch.equal(result.cpu(), expected) for result in results)


@pytest.mark.parametrize("index", [1, 2])
def test_kernels_that_ignore_the_current_stream(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes' own on CUDA, of 4 bits and of double quantization, stood in for by others on the default stream; on
    the device where the library has its table, and on another."""
    device = torch.device(DEVICE.type, index)
    functional = library().functional
    module: Any = torch.get_device_module(DEVICE)
    calls = []

    def on_default_stream(name: str) -> None:
        function = getattr(functional, name)

        def call(values: Tensor, *arguments: Any, **options: Any) -> Any:
            calls.append(name)
            with module.stream(module.default_stream(values.device)):
                found, state = function(values, *arguments, **options)
            outputs = torch.empty_like(found), torch.empty_like(state.absmax)  # whose memory is the current stream's
            with module.stream(module.default_stream(values.device)):
                for output, made in zip(outputs, (found, state.absmax), strict=True):
                    output.copy_(made)
            state.absmax = outputs[1]
            return outputs[0], state

        monkeypatch.setattr(functional, name, call)

    def nearest(values: Tensor, code: Tensor) -> tuple[Tensor, Any]:
        scale = values.abs().max()
        indices = (values[:, None] / scale - code).abs().argmin(1).to(torch.uint8)
        return indices, functional.QuantState(absmax=scale[None])

    def quantize_blockwise(values: Tensor, code: Tensor | None = None, *, blocksize: int) -> Any:
        """What the library does on real devices only, and as it does it: its kernel is `nearest`."""
        code = (functional.name2qmap["dynamic"] if code is None else code).to(values.device)
        indices, state = functional.nearest(values, code)
        code = code.to(values.device, copy=True)
        return indices, functional.QuantState(state.absmax, code=code, blocksize=blocksize, dtype=values.dtype)

    monkeypatch.setitem(functional.name2qmap, "dynamic", functional.create_dynamic_map().to(DEVICE))
    monkeypatch.setattr(functional, "nearest", nearest, raising=False)
    monkeypatch.setattr(functional, "quantize_blockwise", quantize_blockwise)
    for name in ("quantize_4bit", "nearest"):
        on_default_stream(name)
    with measure() as seen:
        model = zoo.load("bitsandbytes_nf4_dq", device=str(device), workers=3)
        del model
        gc.collect()
    assert {"quantize_4bit", "nearest"} == set(calls)
    assert seen.races == []


# Rules broken on purpose


def load_and_use(folder: Path) -> tuple[list[str], bool]:
    """(races, whether the numbers are right) of a load that uses a table of the library, and lets its results go."""
    tensors = numbers(*[3 * PIECE_BYTES // 4] * 3)
    results = []
    with measure() as seen:
        table = torch.ones(1, device=DEVICE) + 1
        items = items_of(folder, tensors)
        for _, result in stream(items, lambda item, dense: dense * table, workers=1, in_flight_bytes=1 << 30):
            results.append(result + 1)
            del result
            gc.collect()
    right = all(torch.equal(a.cpu(), 2 * b + 1) for a, b in zip(results, tensors.values(), strict=True))
    return seen.races, right


def never(monkeypatch: pytest.MonkeyPatch, kind: type, name: str) -> None:
    """Leave out the calls of a method that `qexp.loading.streaming.lanes` makes."""
    method = getattr(kind, name)

    def call(self: Any, *arguments: Any) -> Any:
        if sys._getframe(1).f_globals["__name__"] != lanes.__name__:
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
