"""Copies: counted, late on side streams, and making the host wait where they would on real hardware."""

import gc

import pytest
import torch

from tests.fake_device import counters, memory
from tests.fake_device.counters import measure

DEVICE = torch.device("fake", 1)
MODULE = torch.get_device_module("fake")


def test_bytes_and_copies_are_counted_by_their_way() -> None:
    host = torch.ones(256)
    with measure() as seen:
        one = host.to(DEVICE)
        two = one.to("fake:2")
        two.cpu()
        two.clone()
    assert (seen.h2d_bytes, seen.h2d_copies) == (1024, 1)
    assert (seen.d2d_bytes, seen.d2d_copies) == (1024, 1)
    assert (seen.d2h_bytes, seen.d2h_copies) == (1024, 1)
    assert seen.races == []


def test_pinned_memory_is_emulated() -> None:
    gc.collect()
    before = counters.total.pinned_bytes
    pinned = torch.arange(8).pin_memory()
    assert pinned.is_pinned() and pinned[2:].is_pinned() and not torch.arange(8).is_pinned()
    assert torch.equal(pinned, torch.arange(8))
    assert counters.total.pinned_bytes - before == 64
    with pytest.raises(RuntimeError, match="only dense CPU tensors can be pinned"):
        pinned.to(DEVICE).pin_memory()
    address = pinned.data_ptr()
    del pinned
    assert counters.total.pinned_bytes == before
    assert address not in memory._pinned  # something pageable may come there


@pytest.mark.parametrize(
    ("pinned", "non_blocking", "waits"), [(True, True, 0), (True, False, 1), (False, True, 1), (False, False, 1)]
)
def test_the_host_waits_but_for_pinned_non_blocking_copies(pinned: bool, non_blocking: bool, waits: int) -> None:
    host = torch.ones(4)
    host = host.pin_memory() if pinned else host
    target = torch.empty(4, device=DEVICE)
    with measure() as seen:
        target.copy_(host, non_blocking=non_blocking)
    assert seen.host_syncs == waits
    assert torch.equal(target.cpu(), host)


def test_values_that_the_host_reads_make_it_wait() -> None:
    x = torch.ones(4, device=DEVICE)
    waiting = [x.sum().item, lambda: torch.equal(x, x), x.nonzero, lambda: bool(x[0]), MODULE.synchronize]
    for action in waiting:
        with measure() as seen:
            action()
        assert seen.host_syncs == 1, action
    with measure() as seen:
        x + 1
        MODULE.current_stream(DEVICE).record_event()
    assert seen.host_syncs == 0


def start_copy(host: torch.Tensor, target: torch.Tensor) -> tuple[object, object]:
    side = MODULE.Stream(DEVICE)
    side.wait_stream(MODULE.current_stream(DEVICE))
    with MODULE.stream(side):
        target.copy_(host, non_blocking=True)
        return side, side.record_event()


def waits() -> dict[str, object]:
    return {
        "event by stream": lambda side, event: MODULE.current_stream(DEVICE).wait_event(event),
        "event.wait": lambda side, event: event.wait(MODULE.current_stream(DEVICE)),
        "stream by stream": lambda side, event: MODULE.current_stream(DEVICE).wait_stream(side),
        "event by host": lambda side, event: event.synchronize(),
        "stream by host": lambda side, event: side.synchronize(),
        "device by host": lambda side, event: MODULE.synchronize(DEVICE),
    }


@pytest.mark.parametrize("how", waits())
def test_a_copy_on_a_side_stream_arrives_when_somebody_waits(how: str) -> None:
    host, target = torch.ones(4).pin_memory(), torch.zeros(4, device=DEVICE)
    side, event = start_copy(host, target)
    assert not event.query() and not side.query()
    assert target.isnan().all().item()  # neither the old bytes nor the new ones
    waits()[how](side, event)
    assert event.query() and side.query()
    with measure() as seen:
        assert torch.equal(target.cpu(), host)
    assert seen.races == []


def test_a_wait_delivers_what_was_submitted_before_the_event_and_no_more() -> None:
    host, one, two = torch.ones(4).pin_memory(), torch.zeros(4, device=DEVICE), torch.zeros(4, device=DEVICE)
    side, event = start_copy(host, one)
    with MODULE.stream(side):
        two.copy_(host, non_blocking=True)
    MODULE.current_stream(DEVICE).wait_event(event)
    assert torch.equal(one.cpu(), host)
    assert not side.query()


def test_work_on_one_stream_keeps_its_order() -> None:
    host, target = torch.ones(4).pin_memory(), torch.zeros(4, device=DEVICE)
    side, _ = start_copy(host, target)
    with MODULE.stream(side):
        assert (target + 1).cpu().tolist() == [2, 2, 2, 2]
        target.copy_(host, non_blocking=True)
        assert target.clone().cpu().tolist() == [1, 1, 1, 1]


def test_the_source_of_a_late_copy_is_read_late() -> None:
    """A staging buffer that is filled again too early gives the wrong bytes."""
    host, target = torch.ones(4).pin_memory(), torch.zeros(4, device=DEVICE)
    _, event = start_copy(host, target)
    host.fill_(2)
    event.synchronize()
    assert target.cpu().tolist() == [2, 2, 2, 2]


def test_a_copy_to_the_host_is_late_on_every_stream() -> None:
    host, source = torch.zeros(4).pin_memory(), torch.ones(4, device=DEVICE)
    host.copy_(source, non_blocking=True)
    assert host.isnan().all()
    MODULE.current_stream(DEVICE).synchronize()
    assert host.tolist() == [1, 1, 1, 1]
