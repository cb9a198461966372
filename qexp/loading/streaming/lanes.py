"""How a load uses an accelerator: lanes, in which workers copy and quantize, and pinned memory on the way there.

A lane is a stream beside the one that the model computes on. What a worker makes on an accelerator it makes in a
lane, whose copies run while the next bytes are read, and while another lane quantizes. Streams share no freed memory,
and each lane holds a slice of weights with what quantizing that takes: so there are as many as keep a device busy,
not one for each worker.

Source: PyTorch's notes on CUDA semantics ("Use pinned memory buffers", "Memory management").
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

from qexp.offloading.host import aligned_buffer
from qexp.offloading.payload import holders

LANES = 4  # of each device
PAGE_BYTES = 4096
PIECE_BYTES = (2 << 20) - 2 * PAGE_BYTES  # with the room to align it: pinned memory comes in powers of two

Result = TypeVar("Result")


def has_streams(device: torch.device) -> bool:
    return device.type not in ("cpu", "meta") and hasattr(torch.get_device_module(device), "Stream")


class Lanes:
    """The lanes of one load, on each of its devices that has streams."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        """Called on the thread that will use the results: on what is its current stream now."""
        self._modules = {device: torch.get_device_module(device) for device in set(devices) if has_streams(device)}
        self._users = {device: module.current_stream(device) for device, module in self._modules.items()}
        self._free: dict[torch.device, queue.SimpleQueue[Any]] = {}
        for device, module in self._modules.items():
            self._free[device] = queue.SimpleQueue()
            for _ in range(LANES):
                lane = module.Stream(device=device)
                lane.wait_stream(self._users[device])  # for the tables that libraries have made there
                self._free[device].put(lane)

    def run(self, device: torch.device, make: Callable[..., Result], *arguments: Any) -> Result:
        """Call `make` in a lane of this device, once one is free. The result is complete when this returns, and may be
        used on the user's stream; where the device has no streams, it is what `make` returned."""
        if device not in self._free:
            return make(*arguments)
        lane = self._free[device].get()
        try:
            with self._modules[device].stream(lane):
                result = make(*arguments)
            for tensor in holders(result):
                if tensor.device.type == device.type:
                    tensor.record_stream(self._users[device])  # until it is done there, no lane gets the memory again
            return result
        finally:
            try:
                lane.synchronize()
            finally:
                self._free[device].put(lane)  # also if the device is broken: others wait for it, to find out

    def close(self) -> None:
        """Give back the memory that lanes keep for themselves."""
        for module in self._modules.values():
            module.empty_cache()


class PinnedPieces:
    """Two pinned buffers by which one thread sends bytes to an accelerator: one is filled while the other is copied.
    Where the device has no streams, plain memory, and each copy has ended when it returns."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._copied: list[Any] = [None, None]  # the event after the last copy out of each

    def send(self, target: Tensor, fill: Callable[[Tensor], Tensor]) -> None:
        """Copy what `fill` puts into a buffer, uint8 [PIECE_BYTES + PAGE_BYTES] from the start of a page, to the memory
        of an accelerator. `fill` returns the part to copy."""
        device, host = target.device, torch.device("cpu")
        asynchronous = has_streams(device)
        if not self._buffers:
            nbytes = PIECE_BYTES + PAGE_BYTES
            self._buffers = [aligned_buffer(nbytes, host, pinned=asynchronous, alignment=PAGE_BYTES) for _ in range(2)]
        if self._copied[0] is not None:
            self._copied[0].synchronize()
        target.copy_(fill(self._buffers[0]), non_blocking=asynchronous)
        if asynchronous:
            self._copied[0] = torch.get_device_module(device).current_stream(device).record_event()
        self._buffers.reverse()
        self._copied.reverse()
