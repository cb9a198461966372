"""Whether a loop is being compiled: meanwhile slower code makes the same bytes, the libraries' or that of formulas."""

from __future__ import annotations

import threading

compiling: list[int] = []  # the thread that compiles


def are_ready() -> bool:
    """Return whether loops can be called without waiting for one that another thread compiles."""
    return compiling in ([], [threading.get_ident()])
