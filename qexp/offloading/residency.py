"""Which groups stay on the compute device when there is room for some of them.

A step copies W − R bytes, W being the bytes of all groups and R of those that stay, and takes at least
max(C, (W − R) / BW) for C of computing and a bandwidth BW. So R is made as large as the budget allows: a subset-sum
problem, solved exactly in units of 1/65536 of the budget, with the sums that can be reached as the bits of one integer.
Then, of groups that are equally large, those stay that are spread evenly over the model: a copy hides behind the
computing of the groups between two that travel, and a row of travelling groups has none between them.

Each group is taken to run once in a step; what runs twice would save more.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

UNITS = 2**16


def choose_resident(sizes: Sequence[int], budget: int) -> set[int]:
    """Return numbers of the groups that stay: their sizes add up to at most the budget, and to as much as possible."""
    if budget <= 0:
        return set()
    unit = -(-budget // UNITS)
    classes: dict[int, list[int]] = defaultdict(list)
    for number, size in enumerate(sizes):
        if 0 < size <= budget:
            classes[size].append(number)
    ascending = sorted(classes)
    limit = (1 << (budget // unit + 1)) - 1
    reachable = [1]  # bit s of entry i: a sum of s units can be made of the i smallest sizes
    for size in ascending:
        sums = reachable[-1]
        for _ in classes[size]:
            sums |= (sums << -(-size // unit)) & limit
        reachable.append(sums)
    counts = _take_back([-(-size // unit) for size in ascending], [len(classes[size]) for size in ascending], reachable)
    left = budget - sum(size * count for size, count in zip(ascending, counts, strict=True))
    chosen: set[int] = set()
    for index in reversed(range(len(ascending))):  # rounding up to units may have left room
        size, numbers = ascending[index], classes[ascending[index]]
        more = min(len(numbers) - counts[index], left // size)
        left -= more * size
        chosen.update(_spread(numbers, counts[index] + more))
    return chosen


def _take_back(units: list[int], available: list[int], reachable: list[int]) -> list[int]:
    """Return how many groups of each size make the largest sum: as many large ones as possible."""
    left = reachable[-1].bit_length() - 1
    counts = [0] * len(units)
    for index in reversed(range(len(units))):
        for count in range(min(available[index], left // units[index]), -1, -1):
            if reachable[index] >> (left - count * units[index]) & 1:
                counts[index], left = count, left - count * units[index]
                break
    return counts


def _spread(numbers: list[int], count: int) -> list[int]:
    """`count` of the numbers, evenly spaced."""
    return [numbers[(2 * i + 1) * len(numbers) // (2 * count)] for i in range(count)]
