"""Regular files, and what tells that one has not changed since it was looked at."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

from qexp.errors import LoadError


class FileState(NamedTuple):
    """What changes with a file's content: every write sets the times, and nobody can set ctime."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


@contextmanager
def open_regular(file: Path) -> Iterator[tuple[BufferedReader, FileState]]:
    """Open a file for reading; its state is that of the open descriptor.

    Raises: LoadError if it cannot be opened or read, or is a pipe or a device, which could keep a reader waiting for
    ever.
    """
    try:
        descriptor = open_descriptor(file)
        with os.fdopen(descriptor, "rb") as stream:
            yield stream, state_of(descriptor)
    except OSError as error:
        raise unreadable(file, error) from None


def open_descriptor(file: Path) -> int:
    """Open a regular file. Raises: OSError, or LoadError for anything that is not one; never waits."""
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise LoadError(f"'{file}' is not a regular file; put the checkpoint's file there")
    return descriptor


def state_of(descriptor: int) -> FileState:
    status = os.fstat(descriptor)
    return FileState(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def unreadable(file: Path, error: OSError) -> LoadError:
    return LoadError(
        f"'{file}' cannot be read: {error.strerror}; the checkpoint needs it: put it there, or make it readable"
    )
