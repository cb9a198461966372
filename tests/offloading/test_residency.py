"""Which groups stay on the device, compared with trying all choices."""

import random
from itertools import combinations

import pytest

from qexp.offloading.residency import UNITS, choose_resident


def best(sizes: list[int], budget: int) -> int:
    every = (sum(choice) for count in range(len(sizes) + 1) for choice in combinations(sizes, count))
    return max(total for total in every if total <= budget)


@pytest.mark.parametrize("seed", range(40))
def test_as_many_bytes_as_fit_stay(seed: int) -> None:
    draw = random.Random(seed)
    sizes = [256 * draw.choice([1, 2, 3, 7, 12, draw.randrange(1, 40)]) for _ in range(9)]
    budget = draw.randrange(256, sum(sizes) + 300)
    chosen = choose_resident(sizes, budget)
    assert sum(sizes[number] for number in chosen) == best(sizes, budget)  # exact: the budget is below 65536 units


def test_large_budgets_are_solved_to_the_unit_and_never_exceeded() -> None:
    draw = random.Random(0)
    sizes = [draw.randrange(2**20, 2**28) for _ in range(60)]
    for budget in (2**29, 2**31, sum(sizes) // 2, sum(sizes)):
        total = sum(sizes[number] for number in choose_resident(sizes, budget))
        assert budget * (1 - len(sizes) / UNITS) <= total <= budget


def test_equal_groups_that_stay_are_spread() -> None:
    assert choose_resident([10] * 8, 45) == {1, 3, 5, 7}
    assert choose_resident([10] * 9, 35) == {1, 4, 7}
    assert choose_resident([10] * 5, 10) == {2}


def test_few_large_groups_rather_than_many_small_ones() -> None:
    assert choose_resident([1, 1, 1, 1, 4, 2, 2], 4) == {4}


def test_nothing_or_everything() -> None:
    assert choose_resident([5, 6], 0) == choose_resident([5, 6], -3) == choose_resident([5, 6], 4) == set()
    assert choose_resident([5, 6, 0], 11) == {0, 1}
    assert choose_resident([], 11) == set()
