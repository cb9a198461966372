"""The loading pipeline: one reader, several quantizing workers, one place that assigns.

    reader   preadv of each tensor, in file order, into an arena of fixed size; waits while the arena is full
    workers  call `create` (quantize, or cast) on threads: the libraries release the GIL
    caller   gets (item, result) in the order of the items, whichever worker was first

In flight is what was read and is not yet quantized: never more than `in_flight_bytes`, or the largest tensor if that
is larger. In a load on the CPU, a tensor that is kept as it is in the file is read straight into its final memory.
Files are read, never mapped, so their pages do not count as this process's memory.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qexp.errors import LoadError
from qexp.loading.arena import Arena, Stopped, aligned
from qexp.loading.checkpoint import TensorEntry
from qexp.loading.dtypes import TORCH_DTYPES
from qexp.loading.plan import WorkItem

Create = Callable[..., Any]  # (item, tensor of each entry) -> result
InPlace = Callable[[WorkItem], bool]
TENSOR_ALIGNMENT = 64  # of tensors that share a place in the arena
READ_BYTES = 32 << 20  # a single read: large enough to be fast, small enough to stop soon


def nowhere(item: WorkItem) -> bool:
    return False


def stream(
    items: Sequence[WorkItem], create: Create, *, workers: int, in_flight_bytes: int, in_place: InPlace = nowhere
) -> Iterator[tuple[WorkItem, Any]]:
    """Read each item's tensor, apply `create` to it on a worker, and yield (item, result) in the order of `items`.

    create: (item, a tensor for each of item.entries, on the CPU as in the checkpoint) -> result, called without grad.
    The tensors' memory is used again when it returns, so the result must not share it.
    in_place: whether an item that is kept as it is gets memory of its own, for results that share it (on the CPU).
    Raises whatever a stage raised; all threads have ended when it does.
    """

    def is_staged(item: WorkItem) -> bool:
        return not (in_place(item) and _is_unchanged(item))

    arena = Arena(_arena_bytes([_room(item) for item in items if is_staged(item)], in_flight_bytes))
    todo, done, stop = queue.SimpleQueue[Any](), queue.SimpleQueue[Any](), threading.Event()

    def reader() -> None:
        try:
            with ExitStack() as files:
                opened: dict[Path, int] = {}
                for index, item in enumerate(items):
                    ticket, room = arena.acquire(_room(item)) if is_staged(item) else (None, None)
                    tensors = [_read(entry, part, opened, files, stop) for entry, part in _parts(item, room)]
                    todo.put((index, item, ticket, tensors))
                    del tensors, room
        except Stopped:
            pass
        except BaseException as error:
            done.put((-1, error))
        for _ in range(workers):
            todo.put(None)

    def worker() -> None:
        torch.set_num_threads(1)  # of this thread: the workers are the parallelism
        with torch.no_grad():  # grad mode is not inherited by threads
            while (task := todo.get()) is not None and not stop.is_set():
                index, item, ticket, tensors = task
                try:
                    result = create(item, *map(_transformed, item.entries, tensors))
                except BaseException as error:
                    done.put((-1, error))
                    return
                del task, tensors
                done.put((index, result))
                del result
                if ticket is not None:
                    arena.release(ticket)

    def halt() -> None:
        stop.set()
        arena.stop()
        for _ in range(workers):
            todo.put(None)

    with _running([reader, *[worker] * workers], halt):
        yield from _in_order(items, done)


@contextmanager
def _running(targets: Iterable[Callable[[], None]], halt: Callable[[], None]) -> Iterator[None]:
    """Threads that run during the block and have ended behind it; `halt` tells them to."""
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


def _in_order(items: Sequence[WorkItem], done: queue.SimpleQueue[Any]) -> Iterator[tuple[WorkItem, Any]]:
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


def _is_unchanged(item: WorkItem) -> bool:
    """Whether the bytes that are read are those of the result: neither quantized, nor decoded, cast or transformed."""
    if any(entry.transform is not None for entry in item.entries):
        return False
    return item.stored or (item.spec is None and item.dtype == TORCH_DTYPES.get(item.source.dtype))


def _arena_bytes(sizes: Sequence[int], in_flight_bytes: int) -> int:
    return max(min(in_flight_bytes, sum(map(aligned, sizes))), max(sizes, default=1))


def _room(item: WorkItem) -> int:
    return sum(_padded(entry.nbytes) for entry in item.entries)


def _padded(nbytes: int) -> int:
    return -(-nbytes // TENSOR_ALIGNMENT) * TENSOR_ALIGNMENT


def _parts(item: WorkItem, room: Tensor | None) -> Iterator[tuple[TensorEntry, Tensor]]:
    """Each entry of an item with the uint8 tensor to read it into: a part of `room`, or memory of its own."""
    start = 0
    for entry in item.entries:
        if room is None:
            yield entry, torch.empty(entry.nbytes, dtype=torch.uint8)
        else:
            yield entry, room[start : start + entry.nbytes]
            start += _padded(entry.nbytes)


def _read(
    source: TensorEntry, buffer: Tensor, opened: dict[Path, int], files: ExitStack, stop: threading.Event
) -> Tensor:
    """One tensor, its bytes read into `buffer`; of GGUF blocks the bytes themselves, uint8 [nbytes]. Of a tensor that
    is made by a transform, the numbers that it is made of, [n].

    Raises: LoadError if the file has changed since its header was read.
    """
    array: Any = buffer.numpy()
    view, start = memoryview(array), 0
    for piece in source.pieces or (source,):
        _read_piece(piece, view[start : start + piece.nbytes], opened, files, stop)
        start += piece.nbytes
    if source.block_type is not None:
        return buffer
    numbers = buffer.view(TORCH_DTYPES[source.dtype])
    return numbers if source.transform is not None else numbers.view(source.shape)


def _transformed(source: TensorEntry, stored: Tensor) -> Tensor:
    return stored if source.transform is None else source.transform(stored)


def _read_piece(
    piece: TensorEntry, view: memoryview, opened: dict[Path, int], files: ExitStack, stop: threading.Event
) -> None:
    position = 0
    try:
        if piece.file not in opened:
            opened[piece.file] = os.open(piece.file, os.O_RDONLY)
            files.callback(os.close, opened[piece.file])
        while position < piece.nbytes:
            if stop.is_set():
                raise Stopped
            part = view[position : min(position + READ_BYTES, piece.nbytes)]
            count = os.preadv(opened[piece.file], [part], piece.offset + position)
            if count == 0:
                raise LoadError(
                    f"'{piece.file}' ended within '{piece.name}': it was changed while it was read; load it again"
                )
            position += count
    except OSError as error:
        raise LoadError(
            f"'{piece.file}' cannot be read at '{piece.name}': {error.strerror}; check the disk, or download it again"
        ) from error
