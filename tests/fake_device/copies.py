"""Copies between host and device, and between devices: counted, checked for races, and late where they may be.

`copy_(..., non_blocking=True)` from or to pinned memory does not make the host wait. To the device on its default
stream it runs at once, in the order of the kernels; on a side stream, and always to the host, it is late and its
destination poisoned meanwhile. Every other copy between host and device makes the host wait.
"""

from torch import Tensor

from tests.fake_device import counters, memory, races
from tests.fake_device.memory import is_on_device
from tests.fake_device.streams import Stream, current_stream, is_default


def copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """`aten::_copy_from`: at least one of the two is on a device."""
    stream = current_stream((source if is_on_device(source) else target).device)
    from_host, to_host = not is_on_device(source), not is_on_device(target)
    _count(source, target)
    host_side = source if from_host else target
    asynchronous = non_blocking and memory.is_pinned(host_side)
    late = asynchronous and (to_host or (from_host and not is_default(stream)))
    if not from_host and not to_host:
        _meet(stream, current_stream(target.device))
    _check(source, target, stream)
    read, written = memory.as_host(source), memory.as_host(target)
    if late:
        memory.poison(written)
    stream.launch(lambda: written.copy_(read), late=late)
    if (from_host or to_host) and not asynchronous:
        stream.synchronize()
    if not from_host and not to_host:
        _meet(stream, current_stream(target.device))
    return target


def _meet(one: Stream, other: Stream) -> None:
    """A copy between devices starts when both streams are ready for it, and both go on when it is done."""
    if one is not other:
        one.wait_stream(other)
        other.wait_stream(one)


def _count(source: Tensor, target: Tensor) -> None:
    kinds = (source.device.type, target.device.type)
    way = {("cpu", memory.NAME): "h2d", (memory.NAME, "cpu"): "d2h"}.get(kinds)
    if way is None and source.device != target.device:
        way = "d2d"
    if way is not None:
        nbytes = source.numel() * source.itemsize
        setattr(counters.total, f"{way}_bytes", getattr(counters.total, f"{way}_bytes") + nbytes)
        setattr(counters.total, f"{way}_copies", getattr(counters.total, f"{way}_copies") + 1)


def _check(source: Tensor, target: Tensor, stream: Stream) -> None:
    races.launch(stream.number, stream.clock)
    for tensor, write in ((source, False), (target, True)):
        if is_on_device(tensor) or memory.is_pinned(tensor):
            races.access(tensor, stream.number, stream.clock, write=write, what="copy")
