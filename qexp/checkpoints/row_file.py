"""Write a safetensors file row by row, so that the rows are never all in memory.

The header of a safetensors file has the offset of every tensor, so names, dtypes and shapes must be known first; rows
may then be written in any order. Read it back with `safetensors.safe_open(...).get_slice(name)[start:stop]`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from qexp.checkpoints.dtypes import NAMES
from qexp.checkpoints.safetensors_file import make_header
from qexp.system.files import replacing


class RowFile:
    """An open file of `row_file`; `put` writes rows of one tensor, starting at row `start`."""

    def __init__(self, descriptor: int, shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        described = {name: (NAMES[dtype], shape, dtype.itemsize) for name, (dtype, shape) in shapes.items()}
        header = make_header(described, {"format": "pt"})
        ends = accumulate((dtype.itemsize * math.prod(shape) for dtype, shape in shapes.values()), initial=len(header))
        *starts, end = ends
        self._descriptor, self._shapes, self._offsets = descriptor, shapes, dict(zip(shapes, starts, strict=True))
        os.ftruncate(descriptor, end)
        _write_all(descriptor, memoryview(header), 0)

    def put(self, name: str, start: int, rows: Tensor) -> None:
        dtype, shape = self._shapes[name]
        assert rows.dtype == dtype and rows.shape[1:] == shape[1:] and start + len(rows) <= shape[0], (name, rows.shape)
        offset = self._offsets[name] + start * dtype.itemsize * math.prod(shape[1:])
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
