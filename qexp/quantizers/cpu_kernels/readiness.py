"""Whether a loop is being compiled: meanwhile the libraries' own kernels quantize, to the same bytes, more slowly."""

from __future__ import annotations

import threading

compiling: list[int] = []  # the thread that compiles


def are_ready() -> bool:
    """Return whether loops can be called without waiting for one that another thread compiles."""
    return not compiling or compiling[0] == threading.get_ident()
