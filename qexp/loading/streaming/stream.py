"""The stream of weights: workers that read and quantize, one place that assigns.

    workers  take the next item, read it with preadv, and call `create` (quantize, or cast) on it, on threads: both
             release the GIL
    caller   gets (item, result) in the order of the items, whichever worker was first

An item is read in one of four ways, which the plan has chosen (`WorkItem.read`):

    rows      a weight to quantize, slice by slice, as `create` asks for its rows, into a small buffer that stays in
              the processor's cache
    in_place  what is kept as it is in the file: straight into its final memory, which on an accelerator takes pinned
              buffers and streams
    mapped    the same, where it stays on the CPU: not read at all, its pages are the page cache's (`mapped_files.py`);
              in place for those of its tensors that are not aligned in the file
    staged    anything else, whole, into an arena of `in_flight_bytes`, or of the largest such tensor if that is
              larger; whoever takes the next item waits while there is no room for it

Pages of files that are read do not count as this process's memory; those of mapped ones do once they are used.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import torch
from torch import Tensor

from qexp.checkpoints.tensor_entry import TensorEntry
from qexp.loading.streaming.arena import Arena, Stopped, Window, aligned
from qexp.loading.streaming.file_reader import Reader
from qexp.loading.streaming.lanes import Lanes
from qexp.loading.streaming.mapped_files import MappedFiles
from qexp.loading.work_item import WorkItem

Create = Callable[..., Any]  # (item, tensor of each entry) -> result
TENSOR_ALIGNMENT = 64  # of tensors that share a place in the arena


def stream(
    items: Sequence[WorkItem],
    create: Create,
    *,
    workers: int,
    in_flight_bytes: int,
    ahead_bytes: int | None = None,
) -> Iterator[tuple[WorkItem, Any]]:
    """Read each item's tensor, apply `create` to it on a worker, and yield (item, result) in the order of `items`.

    create: (item, a tensor for each of item.entries, as in the checkpoint) -> result, called without grad; on an
    accelerator, in a lane (`lanes.py`). Staged tensors are on the CPU, and their memory is used again when it returns,
    so the result must not share it. What is read in place is on the item's device, in memory of its own. An item that
    is read by rows has a `RowReader` in place of a tensor. What is mapped is backed by its file: written to, it becomes
    memory of its own, page by page.
    ahead_bytes: of results that workers may have made, or be making, before the caller is done with them (at least
    one), for a caller that is slow; None is any number.
    Raises whatever a stage raised, and at the end LoadError if a mapped file has changed; all threads have ended then.
    """
    arena = Arena(_arena_bytes([_room(item) for item in items if item.read == "staged"], in_flight_bytes))
    window = Window(ahead_bytes)
    turns = iter(_turns(items, workers if ahead_bytes is None else 1))  # or it could wait for what is not taken
    turn = threading.Lock()
    done, stop = queue.SimpleQueue[Any](), threading.Event()
    files = MappedFiles(entry for item in items for entry in item.mapped)

    def take() -> tuple[int, WorkItem, int | None, Tensor | None] | None:
        """Return the next item, and its room in the arena; who comes later waits, so that room is given in order."""
        with turn:
            index, item = next(turns, (-1, None))
            if item is None or stop.is_set():
                return None
            window.enter(item.result_nbytes)
            return index, item, *(arena.acquire(_room(item)) if item.read == "staged" else (None, None))

    def make(reader: Reader, item: WorkItem, room: Tensor | None) -> Any:
        if item.read == "rows":
            return create(item, reader.rows(item.source))
        if item.read == "mapped":
            tensors = [
                files.read(entry) if item.maps(entry) else reader.read(entry, _own_buffer(item, entry))
                for entry in item.entries
            ]
        else:
            tensors = [reader.read(entry, part) for entry, part in _buffers_of(item, room)]
        return create(item, *_transformed(item, tensors))

    def worker() -> None:
        torch.set_num_threads(1)  # of this thread: the workers are the parallelism
        try:
            with torch.no_grad(), closing(Reader(stop)) as reader:  # grad mode is not inherited by threads
                while (task := take()) is not None:
                    index, item, ticket, room = task
                    result = lanes.run(item.device, make, reader, item, room)
                    del task, room
                    done.put((index, result))
                    del result
                    if ticket is not None:
                        arena.release(ticket)  # after the result is handed over: nothing of it is in the arena
        except Stopped:
            pass
        except BaseException as error:
            done.put((-1, error))

    def halt() -> None:
        stop.set()
        arena.stop()
        window.stop()

    with closing(files), closing(Lanes(item.device for item in items)) as lanes, _running([worker] * workers, halt):
        yield from _in_order(items, done, window)
        files.check_unchanged()


@contextmanager
def _running(targets: Iterable[Callable[[], None]], halt: Callable[[], None]) -> Iterator[None]:
    """Run threads during the block and join them behind it; `halt` tells them to end."""
    torch_threads, threads = torch.get_num_threads(), []
    try:
        for target in targets:
            thread = threading.Thread(target=target, name=f"loading-{target.__name__}", daemon=True)
            thread.start()
            threads.append(thread)
        yield
    finally:
        halt()
        for thread in threads:
            thread.join()
        torch.set_num_threads(torch_threads)  # what workers set is also the default of threads to come


def _in_order(
    items: Sequence[WorkItem], done: queue.SimpleQueue[Any], window: Window
) -> Iterator[tuple[WorkItem, Any]]:
    early: dict[int, Any] = {}
    for expected, item in enumerate(items):
        while expected not in early:
            index, result = done.get()
            if index < 0:
                try:
                    raise result
                finally:
                    del result  # its traceback holds this frame, and dense tensors: no cycle may keep them alive
            early[index] = result
            del result
        yield item, early.pop(expected)
        window.leave(item.result_nbytes)  # only now: the caller asks for the next one when it is done with this


def _turns(items: Sequence[WorkItem], workers: int) -> list[tuple[int, WorkItem]]:
    """(number, item) in the order in which workers take them: as the files have them, but the last ones, one large one
    for each worker, by size. Or one would begin a large one when the others are done."""
    turns, room = list(enumerate(items)), workers * max((item.nbytes for item in items), default=0)
    start = len(turns)
    while workers > 1 and start > 0 and items[start - 1].nbytes <= room:
        start -= 1
        room -= items[start].nbytes
    return turns[:start] + sorted(turns[start:], key=lambda turn: -turn[1].nbytes)


def _transformed(item: WorkItem, tensors: Sequence[Tensor]) -> list[Tensor]:
    """What an item's entries stand for. Parts of a stored weight may become part of the result: where some are made by
    a transform, all were staged, so they get memory of their own."""
    made = [
        tensor if entry.transform is None else entry.transform(tensor)
        for entry, tensor in zip(item.entries, tensors, strict=True)
    ]
    if item.stored and any(entry.transform is not None for entry in item.entries):
        return [tensor.clone(memory_format=torch.contiguous_format) for tensor in made]
    return made


def _arena_bytes(sizes: Sequence[int], in_flight_bytes: int) -> int:
    return max(min(in_flight_bytes, sum(map(aligned, sizes))), max(sizes, default=1))


def _room(item: WorkItem) -> int:
    return sum(_padded(entry.nbytes) for entry in item.entries)


def _padded(nbytes: int) -> int:
    return -(-nbytes // TENSOR_ALIGNMENT) * TENSOR_ALIGNMENT


def _buffers_of(item: WorkItem, room: Tensor | None) -> Iterator[tuple[TensorEntry, Tensor]]:
    """Yield each entry of an item with the uint8 tensor to read it into: a part of `room`, or memory of its own."""
    start = 0
    for entry in item.entries:
        if room is None:
            yield entry, _own_buffer(item, entry)
        else:
            yield entry, room[start : start + entry.nbytes]
            start += _padded(entry.nbytes)


def _own_buffer(item: WorkItem, entry: TensorEntry) -> Tensor:
    return torch.empty(entry.nbytes, dtype=torch.uint8, device=item.device)
