"""Traces of memory: few points for any duration, and no peak is lost."""

import numpy as np

from qexp.system.memory_trace import MOST, MemoryTrace


def test_short_times_keep_every_sample_in_order() -> None:
    trace = MemoryTrace()
    for number in range(10):
        trace.add(0.002 * number + 0.0005, 100 + number)
    seconds, values = zip(*trace.points(), strict=True)
    assert values == tuple(range(100, 110))
    assert np.allclose(seconds, [0.002 * number + 0.001 for number in range(10)])  # the middles of slots of 2 ms


def test_long_times_have_few_points_that_hold_the_highest_values() -> None:
    trace, generator = MemoryTrace(), np.random.default_rng(0)
    times = np.sort(generator.uniform(0, 90, 5000))
    values = generator.integers(1, 10**9, 5000)
    for seconds, value in zip(times.tolist(), values.tolist(), strict=True):
        trace.add(seconds, value)
    points = trace.points()
    assert MOST / 2 <= len(points) <= MOST
    for middle, highest in points:
        inside = np.abs(times - middle) <= trace.slot_seconds / 2
        assert highest == values[inside].max()


def test_a_pause_is_a_gap_and_not_a_zero() -> None:
    trace = MemoryTrace()
    trace.add(0.0, 5)
    trace.add(100.0, 7)
    assert [value for _, value in trace.points()] == [5, 7]
