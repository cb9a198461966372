"""Where copies run: on a side stream of the device, or, without one, in program order. `Reader` has the same face."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor


class Streams:
    """Copies on a side stream, where the device has streams and the caller wants them; else in program order."""

    shares_slots = False  # whether a slot may hold several groups at a time

    def __init__(self, device: torch.device, *, use_stream: bool, non_blocking: bool = True) -> None:
        self.device, self.non_blocking = device, non_blocking
        self.module: Any = None if device.type == "cpu" else torch.get_device_module(device)
        self.side: Any = self.module.Stream(device=device) if self.module and use_stream else None

    @property
    def asynchronous(self) -> bool:
        return self.side is not None

    def run(self, copy: Callable[[], None]) -> Any:
        """Start a copy; returns the event after it."""
        with self.copying():
            copy()
            return self.record()

    def copying(self) -> Any:
        return self.module.stream(self.side) if self.side else nullcontext()

    def copy_waits_for(self, event: Any) -> None:
        if self.side and event is not None:
            self.side.wait_event(event)

    def compute_waits_for(self, event: Any) -> None:
        if self.side and event is not None:
            self.module.current_stream(self.device).wait_event(event)

    def record(self) -> Any:
        """Record an event on the current stream: the side stream inside `copying()`, else the compute stream."""
        return self.module.current_stream(self.device).record_event() if self.module else None

    def announce(self, memory: Tensor) -> None:
        """Tell the allocator that the side stream uses some memory: its owner may be dropped with copies in flight."""
        if self.side:
            memory.record_stream(self.side)

    def is_lost(self, event: Any) -> bool:
        """Return whether a copy was dropped, so that only waiting for it would bring it."""
        return False

    def drop_pending(self) -> None:
        """Forget copies that have not begun, where that is possible: another one is waited for."""

    def synchronize(self) -> None:
        if self.module:
            self.module.synchronize(self.device)

    def close(self) -> None:
        self.synchronize()
