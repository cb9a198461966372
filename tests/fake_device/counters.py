"""What happened on the devices: copies between host and device, waits of the host, memory, races."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import wraps
from typing import Any

DEVICES = 3

_lock = threading.RLock()


def one_at_a_time(function: Callable[..., Any]) -> Callable[..., Any]:
    """The device does what one thread asks of it after the other: its books are simple."""

    @wraps(function)
    def alone(*args: Any, **kwargs: Any) -> Any:
        with _lock:
            return function(*args, **kwargs)

    return alone


@dataclass
class Counters:
    """Everything since the process started, or since `measure()` was entered."""

    h2d_bytes: int = 0  # host to device
    h2d_copies: int = 0
    d2h_bytes: int = 0  # device to host
    d2h_copies: int = 0
    d2d_bytes: int = 0  # from one device to another
    d2d_copies: int = 0
    host_syncs: int = 0  # how often the host waited for a device
    kernels: int = 0
    live_bytes: list[int] = field(default_factory=lambda: [0] * DEVICES)  # allocated now, for each device
    peak_bytes: list[int] = field(default_factory=lambda: [0] * DEVICES)  # most that was allocated
    pinned_bytes: int = 0  # of host memory, now
    races: list[str] = field(default_factory=list)


total = Counters()


def allocated(index: int, nbytes: int) -> None:
    total.live_bytes[index] += nbytes
    total.peak_bytes[index] = max(total.peak_bytes[index], total.live_bytes[index])


@contextmanager
def measure() -> Iterator[Counters]:
    """Count what happens inside; complete at the end. Memory is absolute, everything else a difference."""
    before = {item.name: getattr(total, item.name) for item in fields(Counters) if item.type is int}
    races = len(total.races)
    total.peak_bytes[:] = total.live_bytes
    seen = Counters()
    try:
        yield seen
    finally:
        for name, value in before.items():
            setattr(seen, name, getattr(total, name) - value)
        seen.pinned_bytes = total.pinned_bytes
        seen.live_bytes, seen.peak_bytes = list(total.live_bytes), list(total.peak_bytes)
        seen.races = total.races[races:]
