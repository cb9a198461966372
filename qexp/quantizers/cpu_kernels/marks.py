"""What loops say to their compiler: which functions become part of them, and how they should be compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

SYMBOL = "loop"  # of the machine code in each object file

Function = TypeVar("Function", bound=Callable[..., Any])

inlined_functions: list[Callable[..., Any]] = []


def inlined(function: Function) -> Function:
    """Mark a function that loops call: one of their own file, or of `kernels.py`."""
    inlined_functions.append(function)
    return function


def use_widest_vectors() -> None:
    """Have the loop that calls this use vectors of 512 bits, where the processor has them.

    LLVM takes 256 there, which is better for every other loop here. Comparisons set a mask, on one port of Intel's
    cores whatever the width, so that a loop of comparisons takes half the time with twice the width.
    """
