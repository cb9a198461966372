"""CPU time in a unit that means the same on a busy machine.

Other programs on the same cores (shared caches, hyperthreads) double or triple the CPU seconds of a function. So a
fixed loop is timed directly before each call, and the result is scaled to the seconds that the loop takes undisturbed.
"""

import time
from collections.abc import Callable

LOOP_STEPS = 200_000
QUIET_LOOP_SECONDS = 0.02  # of the loop below on one undisturbed core of 2.5 GHz


def quiet_seconds(function: Callable[[], object], repeats: int = 3) -> float:
    """Return the CPU seconds that a call would take on an undisturbed core: the least of some repeats."""
    return QUIET_LOOP_SECONDS * min(_cpu_seconds(function, _loop_seconds()) for _ in range(repeats))


def _cpu_seconds(function: Callable[[], object], unit: float) -> float:
    started = time.process_time()
    function()
    return (time.process_time() - started) / unit


def _loop_seconds() -> float:
    return _cpu_seconds(_loop, 1)


def _loop() -> None:
    numbers: dict[int, str] = {}
    for number in range(LOOP_STEPS):
        numbers[number % 64] = str(number)
