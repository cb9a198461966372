"""The pipeline: bounds, order, bytes and, whatever goes wrong, one error and no thread left."""

import gc
import os
import random
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qexp.checkpoints.checkpoint import open_checkpoint
from qexp.checkpoints.conversion import transposed
from qexp.checkpoints.dtypes import TORCH_DTYPES
from qexp.checkpoints.tensor_entry import DTYPE_BYTES, TensorEntry
from qexp.config.schema import LoaderConfig
from qexp.errors import LoadError
from qexp.loading.streaming import arena as arena_module
from qexp.loading.streaming import file_reader
from qexp.loading.streaming import stream as pipeline
from qexp.loading.streaming.stream import stream
from qexp.loading.weights import stream_plan
from qexp.loading.work_item import Read, WorkItem
from qexp.quantizers.rows import WeightSpec

KIB, MIB = 1 << 10, 1 << 20


pytestmark = pytest.mark.usefixtures("no_thread_is_left")


def save(folder: Path, tensors: dict[str, Tensor]) -> list[WorkItem]:
    """Items that quantize (so they are staged) every tensor of a file, in file order."""
    save_file(tensors, folder / "model.safetensors")
    return items_of(folder / "model.safetensors", quantize=True)


def items_of(file: Path, quantize: bool = False, dtype: torch.dtype | None = None) -> list[WorkItem]:
    items = []
    for entry in open_checkpoint(file).entries.values():
        target = dtype or TORCH_DTYPES[entry.dtype]
        spec = WeightSpec(entry.name.removesuffix(".weight"), (1, 1), target) if quantize else None
        items.append(WorkItem(entry.name, entry, target, entry.nbytes, spec))
    return items


def read_as(read: Read, items: list[WorkItem]) -> list[WorkItem]:
    return [replace(item, read=read) for item in items]


def bytes_tensors(*sizes: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"t{number:03}": torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
        for number, size in enumerate(sizes)
    }


def clone(item: WorkItem, dense: Tensor) -> Tensor:
    return dense.clone()


def run(items: list[WorkItem], create: Any = clone, workers: int = 2, **options: Any) -> list[tuple[WorkItem, Any]]:
    return list(stream(items, create, workers=workers, **{"in_flight_bytes": MIB, **options}))


# Bytes


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("dtype", DTYPE_BYTES)
def test_bytes_equal_those_of_safetensors(dtype: str, in_place: bool, tmp_path: Path) -> None:
    """Staged and read in place, scalars and empty tensors included."""
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape: int) -> Tensor:
        high = 2 if dtype == "BOOL" else 256
        raw = torch.randint(0, high, (*shape, TORCH_DTYPES[dtype].itemsize), dtype=torch.uint8, generator=generator)
        return raw.view(TORCH_DTYPES[dtype]).reshape(shape)

    file = tmp_path / "model.safetensors"
    save_file({"a": tensor(3, 5), "s": tensor(), "e": tensor(0, 4), "b": tensor(7), "c": tensor(1, 2, 3)}, file)
    expected = load_file(file)
    create = (lambda item, dense: dense) if in_place else clone
    items = read_as("in_place" if in_place else "staged", items_of(file))
    results = {item.target: result for item, result in run(items, create)}
    assert set(results) == set(expected)
    for name, result in results.items():
        assert (result.dtype, result.shape) == (expected[name].dtype, expected[name].shape)
        assert bytes(result.flatten().view(torch.uint8).numpy()) == bytes(
            expected[name].flatten().view(torch.uint8).numpy()
        )


def test_a_tensor_longer_than_one_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_reader, "READ_BYTES", 1000)
    tensors = bytes_tensors(2999, 1000, 1, 3001)
    results = run(save(tmp_path, tensors))
    assert all(torch.equal(result, tensors[item.target]) for item, result in results)


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read may return less than asked for."""
    monkeypatch.setattr(os, "preadv", lambda file, parts, offset, read=os.preadv: read(file, [parts[0][:77]], offset))
    tensors = bytes_tensors(1000, 77, 78)
    assert all(torch.equal(result, tensors[item.target]) for item, result in run(save(tmp_path, tensors)))


def test_several_files_are_read_each_at_its_offsets(tmp_path: Path) -> None:
    one, two = bytes_tensors(500, 600, seed=1), bytes_tensors(700, 800, seed=2)
    save_file(one, tmp_path / "one.safetensors")
    save_file({f"other.{name}": tensor for name, tensor in two.items()}, tmp_path / "two.safetensors")
    items = items_of(tmp_path / "one.safetensors", True) + items_of(tmp_path / "two.safetensors", True)
    descriptors = len(os.listdir("/proc/self/fd"))
    for item, result in run(items):
        name = item.target.removeprefix("other.")
        assert torch.equal(result, (two if "other" in item.target else one)[name])
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_of_many_files_few_are_open_at_once(tmp_path: Path) -> None:
    """20 shards, read in turns: a worker that kept each of them open would have 20."""
    items, most, before = [], 0, len(os.listdir("/proc/self/fd"))
    for number in range(20):
        save_file({f"t{number}": torch.full((100,), number)}, tmp_path / f"{number}.safetensors")
        items += items_of(tmp_path / f"{number}.safetensors", quantize=True)

    def create(item: WorkItem, dense: Tensor) -> Tensor:
        nonlocal most
        most = max(most, len(os.listdir("/proc/self/fd")))
        return dense.clone()

    for item, result in run(items * 2, create, workers=2):
        assert torch.equal(result, torch.full((100,), int(item.target[1:])))
    assert 0 < most - before <= 2 * file_reader.OPEN_FILES + 2  # and those that list the folder
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_is_read_in_place_is_not_in_the_arena(tmp_path: Path) -> None:
    """Unchanged copies keep their bytes while others pass through the arena behind them."""
    tensors = bytes_tensors(*[4096] * 20)
    staged = save(tmp_path, tensors)
    kept = read_as("in_place", items_of(tmp_path / "model.safetensors"))
    items = [kept[n] if n % 2 else staged[n] for n in range(20)]

    def create(item: WorkItem, dense: Tensor) -> Tensor:
        return dense if item.spec is None else dense.zero_()

    results = run(items, create, workers=1, in_flight_bytes=4096)
    kept_results = [(item, result) for item, result in results if item.spec is None]
    assert all(torch.equal(result, tensors[item.target]) for item, result in kept_results)
    assert len({result.untyped_storage().data_ptr() for _, result in kept_results}) == 10


def test_parts_of_a_stored_weight_of_which_one_is_transformed_have_memory_of_their_own(tmp_path: Path) -> None:
    """They may become part of the parameter, and the next ones are read to where these were."""
    generator = torch.Generator().manual_seed(0)
    tensors = {f"{part}{n}": torch.randn(16, 24, generator=generator) for n in range(8) for part in ("data", "scale")}
    save_file(tensors, tmp_path / "model.safetensors")
    found = {item.target: item for item in items_of(tmp_path / "model.safetensors")}
    items = [
        replace(
            found[f"data{n}"],
            source=transposed(found[f"data{n}"].source),
            stored=True,
            companions={"scale": found[f"scale{n}"].source},
        )
        for n in range(8)
    ]
    assert not any(item.is_unchanged for item in items)
    results = run(items, lambda item, *parts: parts, workers=1, in_flight_bytes=1)
    for n, (_, (data, scale)) in enumerate(results):
        assert torch.equal(data, tensors[f"data{n}"].t()) and data.is_contiguous()
        assert torch.equal(scale, tensors[f"scale{n}"])


def by_slices(step: int) -> Any:
    """A `create` that copies a weight slice by slice, each at once, as quantizers do."""

    def create(item: WorkItem, rows: Any) -> Tensor:
        return torch.cat([rows[start : start + step].clone() for start in range(0, rows.shape[0], step)])

    return create


@pytest.mark.parametrize("step", [1, 7, 64, 1000])
def test_rows_are_those_of_the_tensor(step: int, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {f"t{n}": torch.randn(rows, 48, generator=generator) for n, rows in enumerate((1, 65, 100, 2))}
    results = run(read_as("rows", save(tmp_path, tensors)), by_slices(step))
    assert len(results) == 4
    assert all(torch.equal(result, tensors[item.target]) for item, result in results)


def test_rows_of_a_tensor_in_pieces(tmp_path: Path) -> None:
    """Of three pieces in two files, in slices that begin and end within pieces."""
    one, two = torch.randn(10, 16), torch.randn(7, 16)
    save_file({"one": one}, tmp_path / "one.safetensors")
    save_file({"two": two}, tmp_path / "two.safetensors")
    (first,), (second,) = (items_of(tmp_path / f"{name}.safetensors", quantize=True) for name in ("one", "two"))
    pieces = (second.source, first.source, second.source)
    nbytes = sum(piece.nbytes for piece in pieces)
    source = replace(first.source, shape=(24, 16), nbytes=nbytes, pieces=pieces)
    whole = replace(first, source=source, read="rows")
    for step in (1, 5, 24):
        ((_, result),) = run([whole], by_slices(step))
        assert torch.equal(result, torch.cat([two, one, two]))


def test_slices_of_rows_share_a_buffer_and_no_worker_has_anothers(tmp_path: Path) -> None:
    together = threading.Barrier(2, timeout=60)

    def create(item: WorkItem, rows: Any) -> set[int]:
        places = {rows[start : start + 4].untyped_storage().data_ptr() for start in range(0, 64, 4)}
        together.wait()
        return places

    tensors = {name: torch.zeros(64, 1000) for name in ("a", "b")}
    (_, first), (_, second) = run(read_as("rows", save(tmp_path, tensors)), create, in_flight_bytes=1)
    assert len(first) == len(second) == 1 and first != second


@pytest.mark.parametrize("offset", [0, 1, 31, 33, 63, 64, 4095])
def test_rows_do_not_lie_just_behind_their_place_in_the_files_pages(offset: int, tmp_path: Path) -> None:
    """Copying to an address 1 to 31 bytes further into its page than the source's takes three times as long."""
    data = torch.randint(0, 256, (9000 + offset,), dtype=torch.uint8)
    (tmp_path / "file").write_bytes(bytes(data.numpy()))
    entry = TensorEntry("t", "U8", (9, 1000), tmp_path / "file", offset, 9000)
    with closing(file_reader.Reader(threading.Event())) as reader:
        rows = reader.rows(entry)
        for start in range(9):
            part = rows[start : start + 1]
            assert torch.equal(part, data[offset:].view(9, 1000)[start : start + 1])
            assert not 0 < (part.data_ptr() - offset - 1000 * start) % 4096 < 32


def test_what_is_read_by_rows_has_nothing_else_of_a_tensor(tmp_path: Path) -> None:
    def create(item: WorkItem, rows: Any) -> Any:
        return rows.float()

    with pytest.raises(AttributeError, match="no 'float', only rows: go through"):
        run(read_as("rows", save(tmp_path, bytes_tensors(100))), create)


def test_nothing_to_load() -> None:
    assert run([]) == []


# Bounds


class Gate:
    """A `create` that says how many bytes are inside, and lets nothing out until told."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.inside: list[int] = []
        self.lock = threading.Lock()

    def __call__(self, item: WorkItem, dense: Tensor) -> int:
        with self.lock:
            self.inside.append(dense.nbytes)
        assert self.open.wait(60)
        return dense.nbytes


def settle(value: Callable[[], object], seconds: float = 0.1) -> object:
    """What `value` says once it has not changed for a while."""
    last, since = value(), time.monotonic()
    while time.monotonic() - since < seconds:
        time.sleep(0.005)
        if (now := value()) != last:
            last, since = now, time.monotonic()
    return last


@pytest.mark.parametrize("cast", [False, True], ids=["quantized", "unchanged"])
def test_what_is_read_and_not_quantized_stays_within_the_bound(
    cast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 tensors of 16 KiB wait at a gate, 32 KiB may be in flight: 2 are read, no more, though 3 workers would."""
    read: list[int] = []

    def counted(file: int, parts: list[memoryview], offset: int, preadv: Any = os.preadv) -> int:
        read.append(len(parts[0]))
        return preadv(file, parts, offset)

    monkeypatch.setattr(os, "preadv", counted)
    save(tmp_path, bytes_tensors(*[16 * KIB] * 64))
    items, gate = items_of(tmp_path / "model.safetensors", quantize=not cast), Gate()
    outcome: list[Any] = []
    thread = threading.Thread(target=lambda: outcome.extend(run(items, gate, 3, in_flight_bytes=32 * KIB)))
    thread.start()
    assert settle(lambda: sum(read)) == 32 * KIB
    assert len(gate.inside) == 2
    gate.open.set()
    thread.join(10)
    assert [nbytes for _, nbytes in outcome] == [16 * KIB] * 64
    assert sum(read) == 64 * 16 * KIB


def test_bytes_in_flight_under_random_delays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of sizes from nothing to the whole bound: what is acquired and not released never exceeds it."""
    chosen, most, now = random.Random(0), [0], [0]

    class Watched(arena_module.Arena):
        def acquire(self, nbytes: int) -> tuple[int, Tensor]:
            ticket, tensor = super().acquire(nbytes)
            with self._changed:
                most[0] = max(most[0], sum(self._used.values()))
                now[0] = self._buffer.numel()
            return ticket, tensor

    monkeypatch.setattr(pipeline, "Arena", Watched)
    sizes = [chosen.choice((0, 1, 5000, 40_000, 64 * KIB)) for _ in range(120)]
    tensors = bytes_tensors(*sizes)

    def slow(item: WorkItem, dense: Tensor) -> Tensor:
        time.sleep(chosen.random() / 500)
        return dense.clone()

    results = run(save(tmp_path, tensors), slow, 4, in_flight_bytes=64 * KIB)
    assert all(torch.equal(result, tensors[item.target]) for item, result in results)
    assert now[0] == 64 * KIB and 32 * KIB < most[0] <= 64 * KIB


def test_the_largest_tensor_may_be_larger_than_the_bound(tmp_path: Path) -> None:
    tensors = bytes_tensors(100, 300 * KIB + 1, 100, 300 * KIB)
    results = run(save(tmp_path, tensors), in_flight_bytes=4 * KIB)
    assert all(torch.equal(result, tensors[item.target]) for item, result in results)


def test_many_small_tensors_are_in_flight_together(tmp_path: Path) -> None:
    """The arena has room for the page that each of them takes, not just for their bytes."""
    inside = threading.Barrier(4, timeout=60)

    def together(item: WorkItem, dense: Tensor) -> None:
        inside.wait()

    assert len(run(save(tmp_path, bytes_tensors(*[8] * 8)), together, workers=4)) == 8


@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize("workers", [1, 3])
def test_results_that_exist_while_the_caller_is_slow(by_rows: bool, workers: int, tmp_path: Path) -> None:
    """40 results of 4 KiB, and one of 64, for a caller that is slower than the workers; 16 KiB may be ahead of it."""
    items = save(tmp_path, {f"t{n:02}": torch.full((64 if n == 20 else 4, KIB), n).byte() for n in range(41)})
    now, most, lock = 0, 0, threading.Lock()

    def count(nbytes: int) -> None:
        nonlocal now, most
        with lock:
            now += nbytes
            most = max(most, now)

    def create(item: WorkItem, dense: Any) -> Tensor:
        count(item.result_nbytes)
        return dense[0 : dense.shape[0]].clone()

    items = read_as("rows" if by_rows else "staged", items)
    results = stream(items, create, workers=workers, ahead_bytes=16 * KIB, in_flight_bytes=MIB)
    for number, (item, result) in enumerate(results):
        assert result.eq(number).all()
        if number % 10 == 0:
            settle(lambda: now, 0.03)
        if number == 19:
            assert most == 16 * KIB
        count(-item.result_nbytes)
    assert most == 64 * KIB and now == 0  # the large one, by itself


def test_an_error_while_a_worker_waits_for_the_caller(tmp_path: Path) -> None:
    items = save(tmp_path, bytes_tensors(*[4 * KIB] * 20))
    with pytest.raises(ValueError, match="caller"):
        for _ in stream(items, clone, workers=3, in_flight_bytes=MIB, ahead_bytes=8 * KIB):
            time.sleep(0.05)  # the workers wait by now
            raise ValueError("caller")


# Order and threads


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_results_come_in_the_order_of_the_items(workers: int, tmp_path: Path) -> None:
    """The first item is the slowest, and the others take turns at being late."""
    items = save(tmp_path, bytes_tensors(*[10] * 30))

    def slow(item: WorkItem, dense: Tensor) -> str:
        number = int(item.target[1:])
        time.sleep(0.15 if number == 0 else 0.004 * (number % 3))
        return item.target

    results = run(items, slow, workers)
    assert [item for item, _ in results] == items
    assert [result for _, result in results] == [item.target for item in items]


def test_more_workers_than_items(tmp_path: Path) -> None:
    tensors = bytes_tensors(10, 20)
    assert len(run(save(tmp_path, tensors), workers=16)) == 2


def test_workers_run_side_by_side_with_one_thread_each_and_without_grad(tmp_path: Path) -> None:
    together, seen = threading.Barrier(3, timeout=60), []

    def create(item: WorkItem, dense: Tensor) -> None:
        together.wait()
        seen.append((threading.current_thread().name, torch.is_grad_enabled(), torch.get_num_threads()))

    torch.set_num_threads(2)
    try:
        with torch.enable_grad():
            run(save(tmp_path, bytes_tensors(1, 1, 1)), create, workers=3)
            assert torch.is_grad_enabled()
        assert torch.get_num_threads() == 2
        later: list[int] = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert later == [2]  # threads started after a load are not limited either
    finally:
        torch.set_num_threads(1)
    assert len(seen) == 3
    assert {values[1:] for values in seen} == {(False, 1)}


def test_the_number_of_threads_is_restored_after_an_error(tmp_path: Path) -> None:
    torch.set_num_threads(2)
    try:
        with pytest.raises(ZeroDivisionError):
            run(save(tmp_path, bytes_tensors(1)), lambda item, dense: 1 // 0)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


# Errors


@pytest.mark.parametrize("by_rows", [False, True])
def test_a_file_cut_after_planning(by_rows: bool, tmp_path: Path) -> None:
    items = read_as("rows" if by_rows else "staged", save(tmp_path, bytes_tensors(1000, 1000, 1000)))
    file = items[1].source.file
    os.truncate(file, items[1].source.offset + 10)
    with pytest.raises(LoadError, match=rf"'{file}' (ended within 't00[12]'|was changed since).*load it again"):
        run(items, by_slices(100) if by_rows else clone)


def _rewrite(file: Path) -> None:
    status, content = file.stat(), file.read_bytes()
    with file.open("r+b") as stream:
        stream.write(content[:-1] + b"!")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def _replace(file: Path) -> None:
    shutil.copy2(file, file.with_name("other"))
    os.replace(file.with_name("other"), file)


def _pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


@pytest.mark.parametrize("change", [_rewrite, _replace, _pipe, lambda file: os.utime(file)])
@pytest.mark.parametrize("by_rows", [False, True])
def test_file_changed_after_planning_is_an_error(by_rows: bool, change: Callable[[Path], None], tmp_path: Path) -> None:
    items = read_as("rows" if by_rows else "staged", save(tmp_path, bytes_tensors(1000, 1000, 1000)))
    change(items[1].source.file)
    with pytest.raises(LoadError, match=r"model\.safetensors' (was changed since its header|is not a regular file)"):
        run(items, by_slices(100) if by_rows else clone)


def test_file_changed_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    items = save(tmp_path, bytes_tensors(1000, 1000, 1000))

    def create(item: WorkItem, dense: Tensor) -> Tensor:
        os.utime(item.source.file)
        return dense.clone()

    with pytest.raises(LoadError, match="was changed since its header was read; load it again"):
        run(items, create, workers=1)


def test_a_file_gone_after_planning(tmp_path: Path) -> None:
    items = save(tmp_path, bytes_tensors(10))
    items[0].source.file.unlink()
    with pytest.raises(LoadError, match=r"model\.safetensors' cannot be read at 't000': No such file"):
        run(items)


def test_a_disk_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    items = save(tmp_path, bytes_tensors(10))
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(LoadError, match="Input/output error; check the disk"):
        run(items)
    assert len(os.listdir("/proc/self/fd")) == descriptors


@pytest.mark.parametrize("workers", [1, 3])
def test_an_error_of_a_worker_while_another_waits_for_room(workers: int, tmp_path: Path) -> None:
    items = save(tmp_path, bytes_tensors(*[8 * KIB] * 50))

    def create(item: WorkItem, dense: Tensor) -> Tensor:
        if item.target == "t005":
            time.sleep(0.05)  # the arena is full by now
            raise RuntimeError(item.target)
        return dense.clone()

    with pytest.raises(RuntimeError, match="t005"):
        run(items, create, workers, in_flight_bytes=8 * KIB * workers)


def test_of_several_errors_one_is_raised(tmp_path: Path) -> None:
    together = threading.Barrier(3, timeout=60)

    def create(item: WorkItem, dense: Tensor) -> None:
        together.wait()
        raise RuntimeError(item.target)

    with pytest.raises(RuntimeError, match="t00") as caught:
        run(save(tmp_path, bytes_tensors(*[10] * 9)), create, workers=3)
    assert caught.value.__cause__ is None and caught.value.__context__ is None


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError])
def test_errors_of_any_kind_reach_the_caller(error: type[BaseException], tmp_path: Path) -> None:
    def create(item: WorkItem, dense: Tensor) -> None:
        raise error("here")

    with pytest.raises(error, match="here"):
        run(save(tmp_path, bytes_tensors(10, 10)), create)


@pytest.mark.parametrize("in_place", [False, True])
def test_an_error_of_the_caller_stops_the_reading(
    in_place: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where nothing waits for room: what is kept unchanged would otherwise be read to the end."""
    monkeypatch.setattr(file_reader, "READ_BYTES", 4 * KIB)
    read = []

    def slow(file: int, parts: list[memoryview], offset: int, preadv: Any = os.preadv) -> int:
        read.append(len(parts[0]))
        time.sleep(0.002)
        return preadv(file, parts, offset)

    monkeypatch.setattr(os, "preadv", slow)
    save(tmp_path, bytes_tensors(4 * KIB, 40 * MIB))
    items = read_as("in_place" if in_place else "staged", items_of(tmp_path / "model.safetensors"))
    with pytest.raises(ValueError, match="caller"):
        # in the file's order, because the caller might be slow
        for _ in stream(items, clone, workers=2, in_flight_bytes=64 * KIB, ahead_bytes=1 << 30):
            raise ValueError("caller")
    assert sum(read) < 20 * MIB


def test_the_last_ones_are_taken_by_size_and_yielded_in_order(tmp_path: Path) -> None:
    """So many as are one large one for each worker; not where a slow caller bounds how far they may be ahead."""
    sizes = [90, 10, 100, 20, 30, 40, 10, 60]
    items, taken = save(tmp_path, bytes_tensors(*sizes)), list[int]()

    def create(item: WorkItem, dense: Tensor) -> int:
        taken.append(len(dense))
        return len(dense)

    turns = [item.nbytes for _, item in pipeline._turns(items, 2)]
    assert turns == [90, 10, 100, 60, 40, 30, 20, 10]  # 160 of 200: with the 100 before them it would be 260
    assert [item.nbytes for _, item in pipeline._turns(items, 1)] == sizes
    assert [item.nbytes for _, item in pipeline._turns(items, 9)] == sorted(sizes, reverse=True)
    assert pipeline._turns([], 2) == []
    assert [result for _, result in run(items, create, workers=2)] == sizes
    assert sorted(taken) == sorted(sizes)
    taken.clear()
    run(items, create, workers=1, ahead_bytes=KIB)
    assert taken == sizes


def test_an_abandoned_stream_ends_its_threads(tmp_path: Path) -> None:
    def slow(item: WorkItem, dense: Tensor) -> None:
        time.sleep(0.02)

    results = stream(save(tmp_path, bytes_tensors(*[8 * KIB] * 50)), slow, workers=2, in_flight_bytes=16 * KIB)
    next(results)
    assert any(thread.name.startswith("loading-") for thread in threading.enumerate())
    del results


def test_a_stream_that_is_never_started_starts_nothing(tmp_path: Path) -> None:
    results = stream(save(tmp_path, bytes_tensors(10)), clone, workers=2, in_flight_bytes=KIB)
    assert not any(thread.name.startswith("loading-") for thread in threading.enumerate())
    del results


def test_threads_that_cannot_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started, start = [], threading.Thread.start

    def limited(thread: threading.Thread) -> None:
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    items = save(tmp_path, bytes_tensors(*[8 * KIB] * 50))
    monkeypatch.setattr(threading.Thread, "start", limited)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        run(items, workers=4, in_flight_bytes=8 * KIB)


# What is kept alive


def planned_stream(items: list[WorkItem], create: Any) -> Iterator[tuple[WorkItem, Any]]:
    return stream_plan(items, create, LoaderConfig(in_flight_mib=1, workers=1), "letting go")


def plain_stream(items: list[WorkItem], create: Any) -> Iterator[tuple[WorkItem, Any]]:
    return stream(items, create, workers=1, in_flight_bytes=KIB)


@pytest.mark.parametrize("streamed", [plain_stream, planned_stream])
def test_dense_tensors_and_results_are_let_go(streamed: Any, tmp_path: Path) -> None:
    """While the stream is suspended it holds no result it has handed out, and no dense tensor of one."""
    alive: list[weakref.ref[Tensor]] = []

    def create(item: WorkItem, dense: Tensor) -> Tensor:
        temporary = dense.clone()
        alive.append(weakref.ref(temporary))
        return temporary.clone()

    results = streamed(save(tmp_path, bytes_tensors(*[100] * 5)), create)
    handed_out = []
    for _, result in results:
        handed_out.append(weakref.ref(result))
        del result
        assert handed_out[-1]() is None
    assert all(reference() is None for reference in alive)


def test_an_error_keeps_tensors_alive_no_longer_than_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a collection of cycles: the arena, and what `create` had allocated, go with the exception."""
    alive: list[weakref.ref[Any]] = []

    class Watched(arena_module.Arena):
        def __init__(self, nbytes: int) -> None:
            super().__init__(nbytes)
            alive.append(weakref.ref(self._buffer))

    monkeypatch.setattr(pipeline, "Arena", Watched)

    def create(item: WorkItem, dense: Tensor) -> None:
        temporary = dense.clone()
        alive.append(weakref.ref(temporary))
        raise RuntimeError("here")

    items = save(tmp_path, bytes_tensors(*[100] * 5))
    gc.collect()
    gc.disable()
    try:
        try:
            for _ in stream(items, create, workers=2, in_flight_bytes=KIB):
                pass
        except RuntimeError as error:
            assert any(reference() is not None for reference in alive)  # a debugger can look at them
            assert str(error) == "here"
        assert len(alive) >= 2
        assert all(reference() is None for reference in alive)
    finally:
        gc.enable()
