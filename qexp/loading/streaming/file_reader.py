"""Tensors out of a checkpoint's files: whole, or row by row into memory that is used again; or onto an accelerator.

What is read is copied from files (`preadv`), not mapped (`mapped_files.py` does that). Copying the kernel's pages costs
time, and how much depends on where it goes: into a buffer that stays in the processor's cache it is twice as fast as
into fresh memory (6.6 against 3 GiB/s on an AMD EPYC), and onto an address that is 1 to 31 bytes further into its page
than the source is into its own, it takes three times as long (2.1 GiB/s): `rep movsb`, by which Linux copies, does not
like that.
"""

from __future__ import annotations

import os
import threading
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qexp.checkpoints.dtypes import TORCH_DTYPES
from qexp.checkpoints.regular_file import open_descriptor, state_of
from qexp.checkpoints.tensor_entry import TensorEntry
from qexp.errors import LoadError
from qexp.loading.streaming.arena import Stopped
from qexp.loading.streaming.lanes import PAGE_BYTES, PIECE_BYTES, PinnedPieces

READ_BYTES = 32 << 20  # a single read: large enough to be fast, small enough to stop soon
OPEN_FILES = 4  # at once, of each thread: a process may have 1024, and a checkpoint hundreds
ALIGNMENT = 64  # of rows in their buffer: a cache line


class Reader:
    """Reads for one thread, from files of which it keeps the last few open until `close`. stop: asked between reads."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop
        self._opened: dict[Path, int] = {}  # file -> descriptor, in the order in which they were opened
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._pieces = PinnedPieces()

    def close(self) -> None:
        while self._opened:
            os.close(self._opened.popitem()[1])

    def read(self, source: TensorEntry, buffer: Tensor) -> Tensor:
        """Return one tensor, its bytes read into `buffer`; of GGUF blocks the bytes themselves, uint8 [nbytes]. Of a
        tensor that is made by a transform, the numbers that it is made of, [n].

        The buffer may be an accelerator's: copies that end in the order of its current stream.
        Raises: LoadError if the file has changed since its header was read.
        """
        if buffer.device.type == "cpu":
            self._fill(buffer, source, 0)
        else:
            self.send(buffer, source, 0)
        return as_tensor(source, buffer)

    def rows(self, source: TensorEntry) -> RowReader:
        return RowReader(self, source)

    def read_rows(self, source: TensorEntry, start: int, stop: int) -> Tensor:
        """Return rows of a tensor of plain numbers, in memory that is valid until the next ones are read."""
        row_bytes = source.nbytes // max(source.shape[0], 1)
        first, nbytes = start * row_bytes, (stop - start) * row_bytes
        if nbytes + PAGE_BYTES > len(self._buffer):
            self._buffer = torch.empty(nbytes + PAGE_BYTES, dtype=torch.uint8)
        part = self._fill_part(nbytes, source, first, self._buffer)
        return part.view(TORCH_DTYPES[source.dtype]).view(stop - start, *source.shape[1:])

    def send(self, target: Tensor, source: TensorEntry, skip: int) -> None:
        """Read the bytes of a tensor from the `skip`th on into memory of an accelerator, uint8 [n], as many as there
        is room for. Its last copies may still run, in the current stream, when this returns."""
        for start in range(0, len(target), PIECE_BYTES):
            room = target[start : start + PIECE_BYTES]
            self._pieces.send(room, partial(self._fill_part, len(room), source, skip + start))

    def _fill_part(self, nbytes: int, source: TensorEntry, skip: int, buffer: Tensor) -> Tensor:
        """Read so many bytes of a tensor, from the `skip`th on, to where in a buffer that is fast; returns that."""
        ahead = (buffer.data_ptr() - source.offset - skip) % PAGE_BYTES  # of the source in its page
        shift = ALIGNMENT if 0 < ahead < ALIGNMENT else 0
        part = buffer[shift : shift + nbytes]
        self._fill(part, source, skip)
        return part

    def _fill(self, buffer: Tensor, source: TensorEntry, skip: int) -> None:
        """Read the bytes of a tensor from the `skip`th on, as many as there is room for."""
        array: Any = buffer.numpy()
        view = memoryview(array)
        for piece in source.pieces or (source,):
            count = min(piece.nbytes - skip, len(view))
            if count > 0:
                self._fill_from(piece, skip, view[:count])
                view = view[count:]
            skip = max(skip - piece.nbytes, 0)

    def _fill_from(self, piece: TensorEntry, skip: int, view: memoryview) -> None:
        position = 0
        try:
            descriptor = self._descriptor(piece.file)
            while position < len(view):
                if self._stop.is_set():
                    raise Stopped
                part = view[position : position + READ_BYTES]
                count = os.preadv(descriptor, [part], piece.offset + skip + position)
                if count == 0:
                    raise LoadError(
                        f"'{piece.file}' ended within '{piece.name}': it was changed while it was read; load it again"
                    )
                position += count
            if piece.state not in (None, state_of(descriptor)):  # asked after reading: what was read is as planned
                raise LoadError(f"'{piece.file}' was changed since its header was read; load it again")
        except OSError as error:
            raise LoadError(
                f"'{piece.file}' cannot be read at '{piece.name}': {error.strerror}; check the disk, or download it "
                "again"
            ) from error

    def _descriptor(self, file: Path) -> int:
        if file not in self._opened:
            if len(self._opened) == OPEN_FILES:
                os.close(self._opened.pop(next(iter(self._opened))))
            self._opened[file] = open_descriptor(file)
            os.posix_fadvise(self._opened[file], 0, 0, os.POSIX_FADV_SEQUENTIAL)  # reads ahead twice as far
        return self._opened[file]


def as_tensor(source: TensorEntry, raw: Tensor) -> Tensor:
    """Return the bytes of an entry, uint8 [nbytes], as the tensor that `Reader.read` returns."""
    if source.block_type is not None:
        return raw
    numbers = raw.view(TORCH_DTYPES[source.pieces[0].dtype if source.pieces else source.dtype])
    return numbers if source.transform is not None else numbers.view(source.shape)


class RowReader:
    """A weight [out, in] whose rows are read when they are asked for: `weight[start:stop]`.

    They are valid until the next ones are asked for.
    """

    def __init__(self, reader: Reader, source: TensorEntry) -> None:
        self._reader, self._source = reader, source
        self.shape, self.dtype = torch.Size(source.shape), TORCH_DTYPES[source.dtype]

    def __getitem__(self, rows: slice) -> Tensor:
        start, stop, step = rows.indices(self.shape[0])
        assert step == 1, rows
        return self._reader.read_rows(self._source, start, stop)

    def send(self, target: Tensor, start: int) -> None:
        """Read rows from `start` on into memory of an accelerator [rows, in], in the order of its current stream."""
        row_bytes = self._source.nbytes // max(self.shape[0], 1)
        self._reader.send(target.view(-1).view(torch.uint8), self._source, start * row_bytes)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"a weight that is being loaded has no {name!r}, only rows: go through qexp.quantizers.rows.row_slices"
        )
