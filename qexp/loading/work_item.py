"""One tensor of a model that is loaded: where and how it is read, and what becomes of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from qexp.checkpoints.dtypes import TORCH_DTYPES
from qexp.checkpoints.tensor_entry import TensorEntry
from qexp.quantizers.rows import WeightSpec

Read = Literal["rows", "in_place", "staged", "mapped"]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class WorkItem:
    """One tensor of the model: `target` from `source`; quantized if it has a spec, else decoded or cast to `dtype`.

    stored: the checkpoint holds this weight ready quantized; `source` is then the first of its inner tensors, and
    companions the others, by what its format calls them.
    read: "rows", a weight to quantize, slice by slice (a `RowReader`), of one plain entry; "in_place", what is kept as
    it is in the file, straight into its final memory; "mapped", the same, on a CPU, but for the entries that `maps`
    refuses; "staged", anything else, whole, into memory that is used again.
    alignment: bytes, of the addresses of mapped entries: what the kernels that will read them take for granted.
    device: where its result is made; also of what travels there, so that it has the bytes of a resident weight.
    """

    target: str
    source: TensorEntry
    dtype: torch.dtype
    result_nbytes: int
    spec: WeightSpec | None = None
    stored: bool = False
    companions: Mapping[str, TensorEntry] = field(default_factory=dict)
    read: Read = "staged"
    device: torch.device = CPU
    alignment: int = 64

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        """Everything that is read for this item."""
        return (self.source, *self.companions.values())

    def place(self) -> tuple[str, int]:
        """Return where it begins: items in this order are read as the kernel reads ahead."""
        return str(self.source.file), self.source.offset

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries)

    @property
    def is_unchanged(self) -> bool:
        """Whether the bytes that are read are those of the result: neither quantized, decoded, cast nor transformed."""
        if any(entry.transform is not None for entry in self.entries):
            return False
        return self.stored or (self.spec is None and self.dtype == TORCH_DTYPES.get(self.source.dtype))

    def maps(self, entry: TensorEntry) -> bool:
        """Return whether an entry can be mapped: it has bytes, in one piece of a file, and its address is aligned."""
        return entry.nbytes > 0 and not entry.pieces and entry.offset % self.alignment == 0

    @property
    def mapped(self) -> list[TensorEntry]:
        """Return the entries that are mapped."""
        return [entry for entry in self.entries if self.maps(entry)] if self.read == "mapped" else []

    @property
    def numel(self) -> int:
        return math.prod(self.source.shape) if self.spec is None else self.spec.numel

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the tensor before quantization: as in the checkpoint, or for a ready-quantized one in its dtype."""
        is_packed = self.stored or self.source.block_type is not None or self.source.is_scaled
        return self.numel * (self.dtype if is_packed else TORCH_DTYPES[self.source.dtype]).itemsize
