"""Tensors of checkpoint files without a copy: their pages are mapped, and stay in the page cache, shared by processes.

A mapping is private: what is written to a tensor goes to a copy of the page, never to the file. Tensors that lie
together in a file share a mapping, so that a model of many thousand tensors stays within the kernel's 65,530 for a
process; a mapping ends with the last tensor in it.

Whoever truncates a mapped file kills the process: the next access to a page that is gone raises SIGBUS.

Source: man 2 mmap.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import weakref
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qexp.checkpoints.regular_file import FileState, open_descriptor, open_regular, state_of
from qexp.checkpoints.tensor_entry import TensorEntry
from qexp.errors import LoadError
from qexp.loading.streaming.file_reader import as_tensor

TOGETHER_BYTES = 16 << 20  # of a file, from which on the next tensor begins a mapping of its own
MAP_NORESERVE = 0x4000  # of asm-generic/mman-common.h; 3.11's mmap has no name for it
MAP_FAILED = ctypes.c_void_p(-1).value
PAGE_BYTES = mmap.PAGESIZE


class MappedFiles:
    """Maps tensors for one load; its workers call `read`, each from its own thread. entries: all that will be read."""

    def __init__(self, entries: Iterable[TensorEntry]) -> None:
        self._run_of: dict[tuple[Path, int], _Run] = {}
        self._states: dict[Path, FileState | None] = {}
        run: _Run | None = None
        for entry in sorted(entries, key=lambda entry: (str(entry.file), entry.offset)):
            if run is None or run.file != entry.file or entry.offset - run.start >= TOGETHER_BYTES:
                run = _Run(entry.file, entry.offset, entry.state)
            run.stop = max(run.stop, entry.offset + entry.nbytes)
            self._run_of[entry.file, entry.offset] = run
            self._states[entry.file] = entry.state

    def read(self, entry: TensorEntry) -> Tensor:
        """Return a tensor as `Reader.read` does. Raises LoadError if its file cannot be mapped."""
        return as_tensor(entry, self._run_of[entry.file, entry.offset].tensor(entry.offset, entry.nbytes))

    def close(self) -> None:
        """Let go of what no tensor uses."""
        self._run_of.clear()

    def check_unchanged(self) -> None:
        """Raise LoadError if a file has changed since its header was read."""
        for file, state in self._states.items():
            with open_regular(file) as (_, now):
                _check_state(file, state, now)


class _Run:
    """A part of a file, mapped when its first tensor is asked for."""

    def __init__(self, file: Path, start: int, state: FileState | None) -> None:
        self.file, self.start, self.stop, self._state = file, start, start, state
        self._lock = threading.Lock()
        self._mapping: Any = None

    def tensor(self, offset: int, nbytes: int) -> Tensor:
        first = self.start // PAGE_BYTES * PAGE_BYTES
        with self._lock:
            if self._mapping is None:
                self._mapping = _map(self.file, first, self.stop - first, self._state)
        return torch.frombuffer(self._mapping, dtype=torch.uint8, count=nbytes, offset=offset - first)


def _check_state(file: Path, planned: FileState | None, now: FileState) -> None:
    if planned not in (None, now):
        raise LoadError(f"'{file}' was changed since its header was read; load it again")


def can_map(file: Path) -> bool:
    """Return whether the file system lets a file be mapped; some in user space do not."""
    with suppress(LoadError):
        _map(file, 0, PAGE_BYTES)
        return True
    return False


def _map(file: Path, offset: int, nbytes: int, state: FileState | None = None) -> Any:
    """Map a part of a file, from a page on: a buffer whose end is the end of the mapping. Raises LoadError."""
    try:
        descriptor = open_descriptor(file)
        try:  # not Python's mmap, which keeps a descriptor open for each
            _check_state(file, state, state_of(descriptor))  # a shorter file would end this process
            protection = mmap.PROT_READ | mmap.PROT_WRITE
            flags = mmap.MAP_PRIVATE | MAP_NORESERVE
            address = _libc().mmap(None, nbytes, protection, flags, descriptor, offset)
            if address == MAP_FAILED:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        finally:
            os.close(descriptor)
    except OSError as error:
        raise LoadError(
            f"'{file}' cannot be mapped: {error.strerror}; set loader.map=false, so that it is read"
        ) from None
    _libc().madvise(address, nbytes, mmap.MADV_WILLNEED)  # a file that is not in the cache is read ahead
    mapped = (ctypes.c_char * nbytes).from_address(address)
    weakref.finalize(mapped, _libc().munmap, address, nbytes).atexit = False
    return mapped


@cache
def _libc() -> Any:
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = (
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64,
    )  # fmt: skip
    library.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    library.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return library
