"""Streams, events, and the device module that torch.get_device_module("fake") returns.

Kernels run when they are launched. Copies on a side stream run late, when somebody waits for them: a compute stream
that waits for an event, or the host. What a stream knows about the others is kept in a vector clock (`races.py`).

Which device and which streams are current is each thread's own affair; what one thread of the host knows, all know.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count

import torch

from tests.fake_device import counters, memory, races
from tests.fake_device.counters import one_at_a_time

Device = torch.device | str | int | None


def index_of(device: Device) -> int:
    """The number of a device; that of the current one for null, "fake", and devices without an index."""
    if isinstance(device, int):
        return device
    index = None if device is None else torch.device(device).index
    return _current.devices[-1] if index is None else index


class Stream:
    _numbers = count()

    def __init__(self, device: Device = None, priority: int = 0) -> None:
        self.index = index_of(device)
        self.number = next(Stream._numbers)
        self.clock: races.Clock = {}
        self._late: list[Callable[[], None]] = []
        self.submitted = self.delivered = 0  # operations that were late when they were submitted
        _streams.add(self)

    @property
    def device(self) -> torch.device:
        return torch.device(memory.NAME, self.index)

    @one_at_a_time
    def launch(self, work: Callable[[], None], *, late: bool) -> None:
        """Run one operation, after those before it; or leave it until somebody waits."""
        if late:
            self._late.append(work)
            self.submitted += 1
        else:
            self.deliver(self.submitted)
            work()

    def deliver(self, until: int) -> None:
        while self.delivered < until:
            self.delivered += 1
            self._late.pop(0)()

    @one_at_a_time
    def wait_event(self, event: Event) -> None:
        event.deliver()
        races.join(self.clock, event.clock)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    @one_at_a_time
    def synchronize(self) -> None:
        """Let the host wait for everything on this stream."""
        counters.total.host_syncs += 1
        if _warn_of_syncs[0]:
            warnings.warn("called a synchronizing operation of the fake device", stacklevel=2)
        self.deliver(self.submitted)
        races.join(races.host, self.clock)

    def query(self) -> bool:
        return self.delivered == self.submitted


class Event:
    def __init__(self, *_: object, **__: object) -> None:
        self.stream: Stream | None = None
        self.clock: races.Clock = {}
        self.position = 0

    @one_at_a_time
    def record(self, stream: Stream | None = None) -> None:
        self.stream = stream or current_stream()
        races.join(self.stream.clock, races.host)
        self.clock, self.position = dict(self.stream.clock), self.stream.submitted

    def deliver(self) -> None:
        if self.stream is not None:
            self.stream.deliver(self.position)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or current_stream()).wait_event(self)

    @one_at_a_time
    def synchronize(self) -> None:
        counters.total.host_syncs += 1
        self.deliver()
        races.join(races.host, self.clock)

    def query(self) -> bool:
        return self.stream is None or self.stream.delivered >= self.position


_warn_of_syncs = [False]
_streams: weakref.WeakSet[Stream] = weakref.WeakSet()
_default = [Stream(index) for index in range(counters.DEVICES)]


class Current(threading.local):
    """Of a thread: the devices that it made current, the last one valid, and the stream of each device."""

    def __init__(self) -> None:
        self.devices = [0]
        self.streams = list(_default)


_current = Current()


def current_stream(device: Device = None) -> Stream:
    return _current.streams[index_of(device)]


def is_default(stream: Stream) -> bool:
    return stream in _default


def forget() -> None:
    """Finish all work, and forget what came before what: histories grow with every stream that there ever was."""
    for stream in list(_streams):
        stream.deliver(stream.submitted)
        stream.clock.clear()
    races.forget()


class DeviceModule:
    """What `torch.cuda` is for CUDA."""

    Stream, Event = Stream, Event
    current_stream = staticmethod(current_stream)

    def is_available(self) -> bool:
        return True

    is_initialized = is_available

    def device_count(self) -> int:
        return counters.DEVICES

    def current_device(self) -> int:
        return _current.devices[-1]

    def set_device(self, device: Device) -> None:
        _current.devices[-1] = index_of(device)

    def default_stream(self, device: Device = None) -> Stream:
        return _default[index_of(device)]

    @contextmanager
    def device(self, device: Device) -> Iterator[None]:
        _current.devices.append(index_of(device))
        try:
            yield
        finally:
            _current.devices.pop()

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        """Make a stream current, and its device."""
        before, _current.streams[stream.index] = current_stream(stream.index), stream
        try:
            with self.device(stream.index):
                yield
        finally:
            _current.streams[stream.index] = before

    @one_at_a_time
    def synchronize(self, device: Device = None) -> None:
        counters.total.host_syncs += 1
        for stream in list(_streams):
            if stream.index == index_of(device):
                stream.deliver(stream.submitted)
                races.join(races.host, stream.clock)

    def set_sync_debug_mode(self, mode: str) -> None:
        """`warn` or `default`, as in torch.cuda: warn of operations that make the host wait."""
        _warn_of_syncs[0] = mode == "warn"

    def empty_cache(self) -> None:
        pass

    def memory_allocated(self, device: Device = None) -> int:
        return counters.total.live_bytes[index_of(device)]

    def max_memory_allocated(self, device: Device = None) -> int:
        return counters.total.peak_bytes[index_of(device)]

    def reset_peak_memory_stats(self, device: Device = None) -> None:
        if not memory.used[0]:
            raise RuntimeError(f"Invalid device argument {index_of(device)}: did you call init?")
        counters.total.peak_bytes[index_of(device)] = counters.total.live_bytes[index_of(device)]

    def mem_get_info(self, device: Device = None) -> tuple[int, int]:
        size = memory.capacity[index_of(device)]
        return size - self.memory_allocated(device), size

    def manual_seed_all(self, seed: int) -> None:
        pass

    def _is_in_bad_fork(self) -> bool:
        return False
