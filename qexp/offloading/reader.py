"""The side stream of a device that has none: a thread that reads weights from disk while the CPU computes.

Like a stream it does one thing after the other, in the order in which they were given to it: memory that is read into
twice ends with the bytes of the second reading, and nobody has to wait for the first. The system call that reads lets
go of the interpreter, so that computing goes on beside it.

What went wrong ahead of time is not raised then: the forward that needs the bytes has them read again, and that reading
says what is wrong, if it still is. The same holds for readings that were dropped, and in a child after a fork, where
the thread is gone. The thread starts with the first reading, and ends with `close()`, with its owner, or at exit.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable

import torch

from qexp.offloading.streams import Streams


class Reading:
    """One copy from disk: the event that says whether its bytes are there."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.work: Callable[[], None] | None = work  # None once it has succeeded
        self.ended = threading.Event()
        self.error: BaseException | None = None
        self.queue: Queue | None = None  # that it was given to last; after a fork nobody serves it any more


class Queue:
    """Readings to do, shared with the thread, which must hold on to nothing else."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.changed = threading.Condition()
        self.waiting: deque[Reading] = deque()
        self.current: Reading | None = None
        self.closed = False
        self.thread = threading.Thread(target=_serve, args=(self,), name="qexp-offload-reader", daemon=True)
        self.thread.start()

    def close(self) -> None:
        """End the thread, after the reading that it is at. In a child after a fork there is none."""
        if os.getpid() != self.process:
            return
        with self.changed:
            self.closed = True
            _drop(self.waiting)
            self.changed.notify()
        if self.thread is not threading.current_thread():
            self.thread.join()


class Reader(Streams):
    """Copies on a thread of their own, for weights on disk that are computed with on the CPU."""

    shares_slots = True

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"), use_stream=False)
        self._queue: Queue | None = None
        self._ends: weakref.finalize[[], Reader] | None = None

    @property
    def asynchronous(self) -> bool:
        return True

    def run(self, copy: Callable[[], None]) -> Reading:
        reading = Reading(copy)
        self._submit(reading)
        return reading

    def _submit(self, reading: Reading) -> None:
        if self._queue is None or self._queue.process != os.getpid():
            self._queue = Queue()
            self._ends = weakref.finalize(self, self._queue.close)
        reading.ended, reading.error, reading.queue = threading.Event(), None, self._queue
        with self._queue.changed:
            self._queue.waiting.append(reading)
            self._queue.changed.notify()

    def compute_waits_for(self, event: Reading | None) -> None:
        """Raise what the reading raises, if it fails now; not what it failed with before it was needed."""
        if event is None or event.work is None:
            return
        if self._is_going_on(event):
            event.ended.wait()
        if event.work is not None:
            self._submit(event)
            event.ended.wait()
        if event.error is not None:
            raise event.error

    def is_lost(self, event: Reading) -> bool:
        """Return whether the bytes will not come unless somebody waits for them."""
        return event.work is not None and event.error is None and not self._is_going_on(event)

    def _is_going_on(self, reading: Reading) -> bool:
        queue = reading.queue
        return queue is not None and queue.process == os.getpid() and not queue.closed and not reading.ended.is_set()

    def drop_pending(self) -> None:
        if self._queue is not None and self._queue.process == os.getpid():
            with self._queue.changed:
                _drop(self._queue.waiting)

    def synchronize(self) -> None:
        """Wait until nothing is read any more; what has not begun is dropped."""
        self.drop_pending()
        if self._queue is not None and self._queue.process == os.getpid():
            with self._queue.changed:
                current = self._queue.current
            if current is not None:
                current.ended.wait()

    def close(self) -> None:
        if self._ends is not None:
            self._ends()
        self._queue, self._ends = None, None


def _drop(waiting: deque[Reading]) -> None:
    while waiting:
        waiting.popleft().ended.set()


def _serve(queue: Queue) -> None:
    while True:
        with queue.changed:
            queue.changed.wait_for(lambda: queue.waiting or queue.closed)
            if queue.closed:
                return
            reading = queue.current = queue.waiting.popleft()
        try:
            assert reading.work is not None
            reading.work()
            reading.work = None
        except BaseException as error:  # for the forward that needs the bytes
            reading.error = error
        with queue.changed:
            queue.current = None
        reading.ended.set()
        del reading
