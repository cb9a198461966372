"""Helpers for heavy libraries: import them without their warnings, make a thing once for all threads."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any


def once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Call a function once for each of its arguments, on whichever thread comes first; others wait, and get the same.

    With `functools.cache` each makes its own, and one is let go: memory of an accelerator, which streams may still use.
    """
    lock, known = threading.RLock(), dict[tuple[Any, ...], Any]()

    @wraps(function)
    def result(*arguments: Any) -> Any:
        if arguments not in known:
            with lock:
                if arguments not in known:
                    known[arguments] = function(*arguments)
        return known[arguments]

    return result


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back warnings while a library is imported: they are about kernels and machines that do not matter here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
