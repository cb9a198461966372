"""One tensor of a file: its name, dtype and shape, and the place of its bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from qexp.checkpoints.gguf_types import BLOCKED_PREFIX
from qexp.checkpoints.regular_file import FileState

MAX_DIMENSIONS = 64  # torch's limit
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """A tensor in a file: `nbytes` bytes from `offset` of `file`.

    dtype: safetensors' name, or "GGUF_" and the block type. shape: of the dense tensor. pieces: for a converted tensor,
    the parts of the file's tensors that hold its values, in order. transform: builds the tensor from these values, [n],
    if they need more than a reshape. state: of the file when its header was read.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int
    pieces: tuple[TensorEntry, ...] = ()
    transform: Callable[[Any], Any] | None = field(default=None, compare=False)
    state: FileState | None = field(default=None, compare=False, repr=False)

    @property
    def is_scaled(self) -> bool:
        """Whether the file holds it quantized, with scales."""
        return bool(self.pieces) and self.pieces[0].dtype != self.dtype

    @property
    def block_type(self) -> str | None:
        """The type of the GGUF blocks that hold this tensor; None for plain numbers."""
        return self.dtype.removeprefix(BLOCKED_PREFIX) if self.dtype.startswith(BLOCKED_PREFIX) else None


class FileHeader(NamedTuple):
    """entries: in the order of their bytes; metadata: strings, in GGUF also numbers and lists; nbytes: everything
    before the tensors."""

    entries: tuple[TensorEntry, ...]
    metadata: Mapping[str, Any]
    nbytes: int
