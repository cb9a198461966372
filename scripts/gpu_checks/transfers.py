"""What crosses the bus, seen from outside the code that causes it: in every operation that PyTorch dispatches.

A copy between host and device is an `aten.copy_`, `aten._to_copy` or `aten.to` with its two ends on different kinds of
device, or the read of one number. Wrapper subclasses are asked to take their operation apart first, so that the copies
of their inner tensors are seen. What a library does in kernels of its own is not seen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class Transfers(TorchDispatchMode):
    """Counts while it is entered: bytes and copies, host to device and device to host."""

    def __init__(self) -> None:
        super().__init__()
        self.h2d_bytes = self.h2d_copies = self.d2h_bytes = self.d2h_copies = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # the wrapper's own handler is asked, and what it does comes here
        result = func(*args, **(kwargs or {}))
        if func is aten.copy_.default:
            self._note(args[1], args[0])
        elif func.overloadpacket in (aten._to_copy, aten.to):
            self._note(args[0], result)
        elif func is aten._local_scalar_dense.default and args[0].device.type != "cpu":
            self.d2h_bytes, self.d2h_copies = self.d2h_bytes + args[0].itemsize, self.d2h_copies + 1
        return result

    def _note(self, source: Tensor, target: Tensor) -> None:
        nbytes = source.numel() * source.itemsize
        if source.device.type == "cpu" != target.device.type:
            self.h2d_bytes, self.h2d_copies = self.h2d_bytes + nbytes, self.h2d_copies + 1
        elif source.device.type != "cpu" == target.device.type:
            self.d2h_bytes, self.d2h_copies = self.d2h_bytes + nbytes, self.d2h_copies + 1
