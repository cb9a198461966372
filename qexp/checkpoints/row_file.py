"""Write a safetensors file row by row, so that the rows are never all in memory.

The header of a safetensors file has the offset of every tensor, so names, dtypes and shapes must be known first; rows
may then be written in any order. Read it back with `safetensors.safe_open(...).get_slice(name)[start:stop]`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from qexp.system.files import replacing

NAMES = {torch.float32: "F32", torch.int32: "I32"}


class RowFile:
    """An open file of `row_file`; `put` writes rows of one tensor, starting at row `start`."""

    def __init__(self, descriptor: int, shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._offsets, end = dict[str, int](), 0
        for name, (dtype, shape) in shapes.items():
            self._offsets[name], nbytes = end, dtype.itemsize * math.prod(shape)
            header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [end, end + nbytes]}
            end += nbytes
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._descriptor, self._start, self._shapes = descriptor, 8 + len(text), shapes
        os.ftruncate(descriptor, self._start + end)
        _write_all(descriptor, memoryview(len(text).to_bytes(8, "little") + text), 0)

    def put(self, name: str, start: int, rows: Tensor) -> None:
        dtype, shape = self._shapes[name]
        assert rows.dtype == dtype and rows.shape[1:] == shape[1:] and start + len(rows) <= shape[0], (name, rows.shape)
        offset = self._start + self._offsets[name] + start * dtype.itemsize * math.prod(shape[1:])
        raw = rows.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        _write_all(self._descriptor, raw.data, offset)


@contextmanager
def row_file(path: Path, shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> Iterator[RowFile]:
    """Create a file of tensors, each (dtype, shape); it gets its name when it is complete. Raises DiskError."""
    with replacing(path) as beside:
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            yield RowFile(descriptor, shapes)
        finally:
            os.close(descriptor)


def _write_all(descriptor: int, content: memoryview, offset: int) -> None:
    while content:
        written = os.pwrite(descriptor, content, offset)
        content, offset = content[written:], offset + written
