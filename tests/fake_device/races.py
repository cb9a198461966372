"""A happens-before checker: did everything that touched the same bytes happen in an order that somebody enforced?

Each stream, and the host, has a vector clock: for every stream, how much of its work is known to be finished before
whatever comes next here. Work on a stream advances the stream's own component; waiting joins the clock of what was
waited for. Two accesses to the same bytes, one of them a write, are a race unless the clock of the later one contains
the earlier one. That finds bugs of every schedule, not only of the one that happened to run.

The caching allocator is checked as well: freed memory goes back to the stream it was allocated on and may be used
there at once, so work on other streams must be known to have finished, or be announced with `record_stream`.

Source: Lamport (1978) and Fidge (1988) for the clocks; torch.cuda._sanitizer does this for kernels on CUDA.
"""

from dataclasses import dataclass, field

from torch import Tensor

from tests.fake_device import counters

Clock = dict[int, int]  # stream -> how many of its operations

host: Clock = {}


@dataclass
class Access:
    start: int  # bytes, from the start of the allocation
    end: int
    stream: int
    time: int
    write: bool
    what: str


@dataclass
class Allocation:
    stream: int
    clock: Clock  # of that stream, kept up to date by it
    accesses: list[Access] = field(default_factory=list)
    recorded: set[int] = field(default_factory=set)  # streams announced with record_stream


_allocations: dict[int, Allocation] = {}  # address ->


def join(clock: Clock, other: Clock) -> None:
    for stream, time in other.items():
        if clock.get(stream, 0) < time:
            clock[stream] = time


def forget() -> None:
    """Start anew, when everything has finished and everybody knows."""
    host.clear()
    for allocation in _allocations.values():
        allocation.accesses.clear()


def launch(stream: int, clock: Clock) -> None:
    """The host starts a kernel or a copy on a stream."""
    join(clock, host)
    clock[stream] = clock.get(stream, 0) + 1


def allocate(address: int, stream: int, clock: Clock) -> None:
    _allocations[address] = Allocation(stream, clock)


def free(address: int) -> None:
    allocation = _allocations.pop(address, None)
    if allocation is None:
        return
    known = dict(allocation.clock)
    join(known, host)
    for access in allocation.accesses:
        ordered = known.get(access.stream, 0) >= access.time or access.stream == allocation.stream
        if not ordered and access.stream not in allocation.recorded:
            _report(f"freed while stream {access.stream} may still use it ({access.what}); no wait, no record_stream")


def record_stream(tensor: Tensor, stream: int) -> None:
    if tensor.numel():
        _allocations[tensor.untyped_storage().data_ptr()].recorded.add(stream)


def access(tensor: Tensor, stream: int, clock: Clock, *, write: bool, what: str) -> None:
    """Note an access of the operation that was launched last on a stream, and report what it races with."""
    if tensor.numel() == 0:
        return
    address = tensor.untyped_storage().data_ptr()
    allocation = _allocations.setdefault(address, Allocation(stream, clock))  # host memory is noted when it is used
    start = tensor.storage_offset() * tensor.itemsize
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    new = Access(start, start + (reach + 1) * tensor.itemsize, stream, clock[stream], write, what)
    kept = []
    for old in allocation.accesses:
        overlaps = old.start < new.end and new.start < old.end
        ordered = clock.get(old.stream, 0) >= old.time
        if overlaps and (old.write or write) and not ordered:
            _report(f"{_say(new)} races with {_say(old)}")
        covered = new.start <= old.start and old.end <= new.end
        if not (covered and (write or (not old.write and old.stream == stream))):
            kept.append(old)
    allocation.accesses = [*kept, new]


def _say(one: Access) -> str:
    return f"{'write' if one.write else 'read'} of bytes {one.start}:{one.end} on stream {one.stream} ({one.what})"


def _report(message: str) -> None:
    counters.total.races.append(message)
