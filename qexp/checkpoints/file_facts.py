"""Facts about the content of files that took long to find, kept in the user's cache folder by the state of the file.

A state (device, inode, size, times) changes with every write. A file that was written moments ago is not trusted: a
second write within the same clock tick would go unnoticed.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path

from qexp.checkpoints.regular_file import FileState
from qexp.system.files import user_cache, write_text

FRESH_NS = 2_000_000_000  # FAT has the coarsest times: 2 s
REMEMBERED_BYTES = 1 << 20  # a smaller file is read again as fast as a fact about it


def recall_fact(kind: str, version: int, state: FileState, *details: object) -> str | None:
    """Return what `remember_fact` kept for the same arguments, or None. version: of how the fact is found."""
    with suppress(OSError, ValueError):
        return _fact_file(kind, (version, tuple(state), *details)).read_text(encoding="ascii")
    return None


def remember_fact(kind: str, fact: str, version: int, state: FileState, *details: object) -> None:
    """Keep a fact about the content of a file; nothing is kept where the folder cannot be written."""
    if state.size > REMEMBERED_BYTES:
        with suppress(OSError):
            write_text(_fact_file(kind, (version, tuple(state), *details)), fact)


def is_settled(state: FileState, read_ns: int) -> bool:
    """Return whether a file whose reading began at a time (`time.time_ns`) was written long enough before."""
    return read_ns - max(state.mtime_ns, state.ctime_ns) > FRESH_NS


def _fact_file(kind: str, key: tuple[object, ...]) -> Path:
    name = hashlib.sha256(repr(key).encode()).hexdigest()
    return user_cache() / kind / name[:2] / name
