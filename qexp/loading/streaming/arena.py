"""A fixed piece of memory that tensors pass through on their way in; it bounds what is in flight, and is reused.
Also a limit on results that wait to be taken.

Fresh memory costs a page fault for every 4 KiB, more than reading the bytes does; memory that is reused costs it once.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

ALIGNMENT = 4096


class Stopped(Exception):
    """The load ended while somebody waited for room."""


class Waiting:
    """What threads wait for, until `stop`."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._stopped = False

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()


class Arena(Waiting):
    """Hands out ranges of one buffer, first fit. `acquire` waits until there is room.

    nbytes: of the whole buffer; no single request may be larger.
    """

    def __init__(self, nbytes: int) -> None:
        super().__init__()
        self._buffer = torch.empty(aligned(nbytes), dtype=torch.uint8)
        self._used: dict[int, int] = {}  # start -> bytes, in the order of their starts

    def acquire(self, nbytes: int) -> tuple[int, Tensor]:
        """(ticket for `release`, uint8 tensor [nbytes]). Raises Stopped after `stop`."""
        size = aligned(nbytes)
        assert size <= self._buffer.numel(), (nbytes, self._buffer.numel())  # or it would wait for ever
        with self._changed:
            start = self._find(size)
            while start is None and not self._stopped:
                self._changed.wait()
                start = self._find(size)
            if self._stopped or start is None:
                raise Stopped
            self._used = dict(sorted({**self._used, start: size}.items()))
        return start, self._buffer[start : start + nbytes]

    def _find(self, size: int) -> int | None:
        position = 0
        for start, used in self._used.items():
            if start - position >= size:
                return position
            position = start + used
        return position if self._buffer.numel() - position >= size else None

    def release(self, ticket: int) -> None:
        with self._changed:
            del self._used[ticket]
            self._changed.notify_all()


class Window(Waiting):
    """How far workers may be ahead of whoever takes their results, in bytes of results; one is let in at any size.

    nbytes: None is any number.
    """

    def __init__(self, nbytes: int | None) -> None:
        super().__init__()
        self._room, self._inside = nbytes, 0

    def enter(self, nbytes: int) -> None:
        """Wait until a result of this size may be made. Raises Stopped after `stop`."""
        with self._changed:
            while not (self._stopped or self._fits(nbytes)):
                self._changed.wait()
            if self._stopped:
                raise Stopped
            self._inside += nbytes

    def _fits(self, nbytes: int) -> bool:
        return self._room is None or self._inside == 0 or self._inside + nbytes <= self._room

    def leave(self, nbytes: int) -> None:
        with self._changed:
            self._inside -= nbytes
            self._changed.notify_all()


def aligned(nbytes: int) -> int:
    """Return the bytes that a request of `nbytes` takes of an arena."""
    return max(-(-nbytes // ALIGNMENT), 1) * ALIGNMENT
