"""Cases of large products: in the default run a few that cover what matters, in `scripts/check --all` all of them."""

from collections.abc import Collection, Iterable, Sequence
from itertools import product
from typing import Any

import pytest
from allpairspy import AllPairs


def exhaustive(*values: Any) -> Any:
    """One case that only `scripts/check --all` runs."""
    return pytest.param(*values, marks=pytest.mark.exhaustive)


def representatives(names: Iterable[Any], kept: Collection[Any]) -> list[Any]:
    """Return a parameter for each name, or tuple of names; those that are not kept are exhaustive.

    Raises: ValueError if a kept name is none of the names, as after a renaming.
    """
    names = list(names)
    if unknown := [name for name in kept if name not in names]:
        raise ValueError(f"kept, but not there: {unknown}; there are {names}")
    return [name if name in kept else exhaustive(*(name if isinstance(name, tuple) else (name,))) for name in names]


def pairwise(*axes: Sequence[Any]) -> list[Any]:
    """Return the product of three axes or more; by default, a part in which every two values of two axes meet."""
    if len(axes) < 3:
        raise ValueError("every pair of two axes is their whole product: name representatives of each instead")
    covering = {tuple(case) for case in AllPairs([list(axis) for axis in axes])}
    return [case if case in covering else exhaustive(*case) for case in product(*axes)]


def diagonal(rows: Iterable[Any], columns: Iterable[Any]) -> list[Any]:
    """Return the product of two axes; by default, a part of it in which every value of either occurs."""
    rows, columns = list(rows), list(columns)
    count = max(len(rows), len(columns))
    kept = [(rows[i % len(rows)], columns[i % len(columns)]) for i in range(count)]
    return representatives(product(rows, columns), kept)
