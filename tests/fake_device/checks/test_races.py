"""The happens-before checker: each kind of race is reported, and correct programs are not."""

from collections.abc import Iterator

import pytest
import torch

from tests.fake_device.counters import measure

DEVICE = torch.device("fake", 0)
MODULE = torch.get_device_module("fake")


@pytest.fixture
def side() -> object:
    return MODULE.Stream(DEVICE)


@pytest.fixture
def host() -> Iterator[torch.Tensor]:
    yield torch.ones(64).pin_memory()
    MODULE.synchronize()


def compute() -> object:
    return MODULE.current_stream(DEVICE)


def copy_on(side: object, target: torch.Tensor, host: torch.Tensor) -> object:
    with MODULE.stream(side):
        target.copy_(host, non_blocking=True)
        return side.record_event()


@pytest.mark.parametrize("waits", [True, False])
def test_a_kernel_that_does_not_wait_for_the_copy(side, host, waits: bool) -> None:
    with measure() as seen:
        slot = torch.empty(64, device=DEVICE)
        side.wait_stream(compute())
        event = copy_on(side, slot, host)
        if waits:
            compute().wait_event(event)
        slot + 1
    assert len(seen.races) == (0 if waits else 1)
    assert waits or "read of bytes 0:256" in seen.races[0]
    side.synchronize()


@pytest.mark.parametrize("waits", [True, False])
def test_a_copy_that_does_not_wait_for_the_kernel(side, host, waits: bool) -> None:
    """The slot is reused too early: the output is right on this device, and wrong on hardware that is late."""
    slot = host.to(DEVICE)
    with measure() as seen:
        result = slot + 1
        if waits:
            side.wait_event(compute().record_event())
        event = copy_on(side, slot, host)
        compute().wait_event(event)
    assert result.cpu().tolist() == [2] * 64
    assert len(seen.races) == (0 if waits else 1)


def test_waiting_is_transitive(side, host) -> None:
    other = MODULE.Stream(DEVICE)
    with measure() as seen:
        slot = torch.empty(64, device=DEVICE)
        side.wait_stream(compute())
        event = copy_on(side, slot, host)
        other.wait_event(event)
        compute().wait_event(other.record_event())
        slot + 1
    assert seen.races == []


@pytest.mark.parametrize("how", ["event", "stream", "device"])
def test_the_host_may_wait_for_all(side, host, how: str) -> None:
    slot = host.to(DEVICE)
    with measure() as seen:
        slot + 1
        event = compute().record_event()
        {"event": event.synchronize, "stream": compute().synchronize, "device": MODULE.synchronize}[how]()
        compute().wait_event(copy_on(side, slot, host))
    assert seen.races == []


def test_what_kernels_write_is_known_too(side, host) -> None:
    back = torch.empty(64).pin_memory()
    updated, read = host.to(DEVICE), host.to(DEVICE)
    MODULE.synchronize()
    for make, races in (
        (lambda: updated.add_(1), 1),
        (lambda: read + 1, 1),
        (lambda: read.roll(1), 1),
        (lambda: read, 0),
    ):
        with measure() as seen:
            result = make()
            with MODULE.stream(side):
                back.copy_(result, non_blocking=True)
        assert len(seen.races) == races
        side.synchronize()


def test_an_event_that_was_recorded_too_early_does_not_help(side, host) -> None:
    slot = host.to(DEVICE)
    with measure() as seen:
        event = compute().record_event()
        slot + 1
        side.wait_event(event)
        copy_on(side, slot, host)
    assert len(seen.races) == 1
    side.synchronize()


def test_two_readers_and_separate_bytes_do_not_race(side, host) -> None:
    memory = torch.zeros(128, device=DEVICE)
    side.wait_stream(compute())
    with measure() as seen:
        copy_on(side, memory[:64], host)
        memory[64:] + 1
    assert seen.races == []
    with measure() as seen:
        memory[63:65] + 1
    assert len(seen.races) == 1
    side.synchronize()


@pytest.mark.parametrize("remedy", ["none", "wait", "record_stream"])
def test_memory_that_is_freed_while_another_stream_uses_it(side, host, remedy: str) -> None:
    slot = torch.empty(64, device=DEVICE)
    with measure() as seen:
        side.wait_stream(compute())
        event = copy_on(side, slot, host)
        if remedy == "wait":
            compute().wait_event(event)
        elif remedy == "record_stream":
            slot.record_stream(side)
        del slot
        side.synchronize()
    # the copy that is still to come keeps the bytes alive here, so the report may come with the host's wait
    assert len(seen.races) == (1 if remedy == "none" else 0)


def test_a_copy_between_devices_is_ordered_on_both() -> None:
    with measure() as seen:
        one = torch.ones(64, device="fake:1") + 1
        two = one.to("fake:2") + 1
        one.add_(1)
        one.copy_(two)
        two.add_(1)
    assert seen.races == []
    assert one.cpu().tolist() == [3] * 64
