"""One tensor of a file: its name, dtype and shape, and where its bytes are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qexp.checkpoints.gguf_types import BLOCKED_PREFIX
from qexp.checkpoints.regular_file import FileState

MAX_DIMENSIONS = 64  # torch's limit
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: `nbytes` bytes from `offset` of `file`.

    dtype: safetensors' name for it; of GGUF blocks "GGUF_" and their type. shape: of the dense tensor.
    pieces: the parts of other tensors that it is made of, in their order, if it is none of the file's own; transform:
    makes the tensor of all their numbers, [n], where these are not its own in their order. state: of the file when its
    header was read.
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
        """Whether the file holds it in fewer bits, with scales."""
        return bool(self.pieces) and self.pieces[0].dtype != self.dtype

    @property
    def block_type(self) -> str | None:
        """The type of the GGUF blocks that hold this tensor; None for plain numbers."""
        return self.dtype.removeprefix(BLOCKED_PREFIX) if self.dtype.startswith(BLOCKED_PREFIX) else None
