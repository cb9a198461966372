"""The loading pipeline: one reader, several quantizing workers, one place that assigns.

    reader   preadv of each tensor, in file order, into an arena of fixed size; waits while the arena is full
    workers  call `create` (quantize, or cast) on threads: the libraries release the GIL
    caller   gets (item, result) in the order of the items, whichever worker was first

In flight is what was read and is not yet quantized: never more than `in_flight_bytes`, or the largest tensor if that
is larger. A tensor that is kept as it is in the file is read straight into its final memory. Files are read, never
mapped, so their pages do not count as this process's memory.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qexp.errors import LoadError
from qexp.loading.arena import Arena, Stopped
from qexp.loading.plan import TORCH_DTYPES, WorkItem

Create = Callable[[WorkItem, Tensor], Any]
READ_BYTES = 32 << 20  # a single read: large enough to be fast, small enough to stop soon


def stream(
    items: Sequence[WorkItem], create: Create, *, workers: int, in_flight_bytes: int
) -> Iterator[tuple[WorkItem, Any]]:
    """Read each item's tensor, apply `create` to it on a worker, and yield (item, result) in the order of `items`.

    create: (item, dense tensor on the CPU in the checkpoint's dtype) -> result, called without grad. The result may
    share memory with the tensor only if the item is copied unchanged.
    Raises whatever a stage raised; all threads have ended when it does.
    """
    arena = Arena(_arena_bytes(items, in_flight_bytes))
    todo, done, stop = queue.SimpleQueue[Any](), queue.SimpleQueue[Any](), threading.Event()

    def reader() -> None:
        try:
            with ExitStack() as files:
                opened: dict[Path, int] = {}
                for index, item in enumerate(items):
                    ticket, buffer = arena.acquire(item.source.nbytes) if _is_staged(item) else (None, _fresh(item))
                    _read(item, buffer, opened, files)
                    todo.put((index, item, ticket, buffer))
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
                index, item, ticket, buffer = task
                try:
                    result = create(item, _typed(item, buffer))
                except BaseException as error:
                    done.put((-1, error))
                    return
                del task, buffer
                done.put((index, result))
                del result
                if ticket is not None:
                    arena.release(ticket)

    threads_before = torch.get_num_threads()
    threads = [threading.Thread(target=reader, name="reader", daemon=True)]
    threads += [threading.Thread(target=worker, name=f"worker-{n}", daemon=True) for n in range(workers)]
    for thread in threads:
        thread.start()
    try:
        yield from _in_order(items, done)
    finally:
        stop.set()
        arena.stop()
        for _ in range(workers):
            todo.put(None)
        for thread in threads:
            thread.join()
        torch.set_num_threads(threads_before)


def _in_order(items: Sequence[WorkItem], done: queue.SimpleQueue[Any]) -> Iterator[tuple[WorkItem, Any]]:
    early: dict[int, Any] = {}
    for expected, item in enumerate(items):
        while expected not in early:
            index, result = done.get()
            if index < 0:
                raise result
            early[index] = result
        yield item, early.pop(expected)


def _is_staged(item: WorkItem) -> bool:
    """Whether the tensor's bytes only pass through: it is quantized, or cast."""
    return item.spec is not None or item.dtype != TORCH_DTYPES[item.source.dtype]


def _arena_bytes(items: Sequence[WorkItem], in_flight_bytes: int) -> int:
    sizes = [item.source.nbytes for item in items if _is_staged(item)]
    return max(min(in_flight_bytes, sum(sizes)), max(sizes, default=1))


def _fresh(item: WorkItem) -> Tensor:
    return torch.empty(item.source.nbytes, dtype=torch.uint8)


def _typed(item: WorkItem, buffer: Tensor) -> Tensor:
    return buffer.view(TORCH_DTYPES[item.source.dtype]).view(item.source.shape)


def _read(item: WorkItem, buffer: Tensor, opened: dict[Path, int], files: ExitStack) -> None:
    """Read the bytes of one tensor. Raises LoadError if the file has changed since its header was read."""
    source = item.source
    if source.file not in opened:
        opened[source.file] = os.open(source.file, os.O_RDONLY)
        files.callback(os.close, opened[source.file])
    array: Any = buffer.numpy()
    view, position = memoryview(array), 0
    while position < source.nbytes:
        part = view[position : min(position + READ_BYTES, source.nbytes)]
        count = os.preadv(opened[source.file], [part], source.offset + position)
        if count == 0:
            raise LoadError(f"'{source.file}' ended within '{source.name}'; it was changed while it was read")
        position += count
