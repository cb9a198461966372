"""Open regular files, and record the state that changes with every write."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from threading import Thread
from typing import NamedTuple

from qexp.errors import LoadError

AHEAD_BYTES = 256 << 20  # what a disk reads in the half second that a plan takes


class FileState(NamedTuple):
    """The state of a file that every write changes; ctime cannot be set by users."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


@contextmanager
def open_regular(file: Path) -> Iterator[tuple[BufferedReader, FileState]]:
    """Open a file for reading, with the state of the open descriptor.

    Raises: LoadError if it cannot be read, or is a pipe or a device, which could block the reader forever.
    """
    try:
        descriptor = open_descriptor(file)
        with os.fdopen(descriptor, "rb") as stream:
            yield stream, state_of(descriptor)
    except OSError as error:
        raise unreadable(file, error) from None


def open_descriptor(file: Path) -> int:
    """Open a regular file without blocking. Raises OSError, or LoadError if it is not a regular file."""
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise LoadError(f"'{file}' is not a regular file; put the checkpoint's file there")
    return descriptor


def state_of(descriptor: int) -> FileState:
    status = os.fstat(descriptor)
    return FileState(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def read_ahead(files: Iterable[Path], nbytes: int = AHEAD_BYTES) -> None:
    """Have the system read the beginning of files into its page cache while the caller does something else.

    A file that cannot be read is left to whoever reads it.
    """
    Thread(target=_advise, args=(list(files), nbytes), name="read-ahead", daemon=True).start()


def _advise(files: Iterable[Path], nbytes: int) -> None:
    for file in files:
        if nbytes <= 0 or not hasattr(os, "posix_fadvise"):
            return
        with suppress(OSError, LoadError), open_regular(file) as (stream, state):
            os.posix_fadvise(stream.fileno(), 0, min(nbytes, state.size), os.POSIX_FADV_WILLNEED)
            nbytes -= state.size


def unreadable(file: Path, error: OSError) -> LoadError:
    return LoadError(
        f"'{file}' cannot be read: {error.strerror}; the checkpoint needs this file; put it there, or make it readable"
    )
