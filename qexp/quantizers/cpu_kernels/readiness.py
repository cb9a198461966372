"""Whether compiled loops are there, or still on their way: then the libraries' own kernels quantize, to the same bytes.

Importing Numba and reading its cache takes half a second, compiling for a new machine seconds. A load that nobody
measures does not wait for that: `prepare_beside` does it on a thread while the first weights are read. Formats whose
loops round differently from their formulas in PyTorch wait (`wait`), so that a result never depends on time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress

_threads: set[threading.Thread] = set()  # that prepare


def are_ready() -> bool:
    """Return whether this thread may call compiled loops without waiting for another one."""
    return not _threads or threading.current_thread() in _threads


def prepare_beside(quantize: Callable[[], None]) -> None:
    """Run what calls the loops for the first time on a thread. An error there is raised where they are called next."""

    def run() -> None:
        try:
            with suppress(Exception):
                quantize()
        finally:
            _threads.discard(thread)

    thread = threading.Thread(target=run, name="preparing-kernels")  # the process ends after it: it holds LLVM
    _threads.add(thread)
    thread.start()


def wait() -> None:
    """Return once compiled loops can be called."""
    for thread in list(_threads):
        if thread is not threading.current_thread():
            thread.join()
