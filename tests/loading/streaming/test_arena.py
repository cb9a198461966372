"""The arena hands out disjoint ranges, waits for room, as does the window, and lets waiters go when it is stopped."""

import random
import threading

import pytest

from qexp.loading.streaming.arena import ALIGNMENT, Arena, Stopped, Window, aligned

PAGE = ALIGNMENT


def test_sizes_are_rounded_up() -> None:
    assert [aligned(n) for n in (0, 1, PAGE, PAGE + 1)] == [PAGE, PAGE, PAGE, 2 * PAGE]


def test_ranges_have_the_size_asked_for() -> None:
    arena = Arena(10 * PAGE)
    for nbytes in (0, 1, 5000, 6 * PAGE):
        assert arena.acquire(nbytes)[1].shape == (nbytes,)


def test_ranges_in_use_are_disjoint_and_room_is_used_again() -> None:
    """1,000 seeded requests: each range keeps what was written to it until it is released."""
    arena, chosen = Arena(64 * PAGE), random.Random(0)
    held: dict[int, tuple[object, int, int]] = {}
    used = 0
    for number in range(1000):
        nbytes = chosen.choice((0, 1, 100, PAGE, 3 * PAGE, chosen.randrange(8 * PAGE)))
        while used + aligned(nbytes) > 48 * PAGE or (held and chosen.random() < 0.4):
            ticket = chosen.choice(list(held))
            tensor, value, size = held.pop(ticket)
            assert (tensor == value).all()  # type: ignore[attr-defined]
            arena.release(ticket)
            used -= size
        if arena._find(aligned(nbytes)) is None:  # room, but in pieces: a single thread would wait for itself
            continue
        ticket, tensor = arena.acquire(nbytes)
        assert ticket not in held
        tensor.fill_(number % 256)
        held[ticket] = (tensor, number % 256, aligned(nbytes))
        used += aligned(nbytes)
    assert all((tensor == value).all() for tensor, value, _ in held.values())  # type: ignore[attr-defined]


def waiting(arena: Arena, nbytes: int) -> tuple[threading.Thread, list[object]]:
    """A thread that acquires, and what became of it."""
    outcome: list[object] = []

    def acquire() -> None:
        try:
            outcome.append(arena.acquire(nbytes))
        except Stopped:
            outcome.append("stopped")

    thread = threading.Thread(target=acquire, daemon=True)
    thread.start()
    return thread, outcome


def test_a_full_arena_is_waited_for() -> None:
    arena = Arena(4 * PAGE)
    first, second = arena.acquire(2 * PAGE)[0], arena.acquire(2 * PAGE)[0]
    thread, outcome = waiting(arena, 3 * PAGE)
    arena.release(second)  # 2 pages are not enough
    thread.join(0.05)
    assert thread.is_alive() and outcome == []
    arena.release(first)
    thread.join(5)
    assert not thread.is_alive() and len(outcome) == 1


def test_stop_ends_the_waiting_and_everything_after() -> None:
    arena = Arena(PAGE)
    arena.acquire(1)
    thread, outcome = waiting(arena, 1)
    arena.stop()
    thread.join(5)
    assert outcome == ["stopped"]
    with pytest.raises(Stopped):
        arena.acquire(1)


def test_a_request_that_never_fits_does_not_wait() -> None:
    with pytest.raises(AssertionError):
        Arena(PAGE).acquire(PAGE + 1)


def test_a_window_lets_in_what_fits_and_one_of_any_size() -> None:
    window, let_in = Window(10), threading.Semaphore(0)
    window.enter(100)

    def enter() -> None:
        for nbytes in (6, 4, 1):
            window.enter(nbytes)
            let_in.release()

    thread = threading.Thread(target=enter, daemon=True)
    thread.start()
    assert not let_in.acquire(timeout=0.05)
    window.leave(100)
    assert let_in.acquire(timeout=60) and let_in.acquire(timeout=60)
    assert not let_in.acquire(timeout=0.05)
    window.leave(6)
    assert let_in.acquire(timeout=60)
    thread.join(5)


def test_a_window_without_a_bound_lets_in_everything_until_it_is_stopped() -> None:
    window = Window(None)
    for _ in range(3):
        window.enter(1 << 40)
    window.stop()
    with pytest.raises(Stopped):
        window.enter(0)
