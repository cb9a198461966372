"""Parse the header of a GGUF file: its metadata, its tensors and their offsets. Imports no torch.

A file is "GGUF", a version, the numbers of tensors and of metadata fields; the fields (name, type, value); for each
tensor its name, dimensions (the fastest first: [in, out]), type and offset; then, from the next multiple of
`general.alignment` on, the tensors' bytes, each at such a multiple, in order. All numbers are little-endian.

If a tensor's rows are not whole blocks, ComfyUI's converter stores rows of 256 values and the original shape as
metadata, `comfy.gguf.orig_shape.<tensor>`; the parsed tensor gets that shape.

The file is read, never mapped, and every size is validated before memory is allocated for it: a count or length must
fit into the rest of the file, a header into MAX_HEADER_BYTES, and the tensors must fill the rest of the file without
gap or overlap, as ggml requires.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Mapping
from dataclasses import replace
from io import BufferedReader
from pathlib import Path
from reprlib import repr as brief
from typing import Any, BinaryIO

from qexp.checkpoints.foreign_files import refuse_foreign, refuse_other_format
from qexp.checkpoints.gguf_types import BLOCKED_PREFIX, BY_NUMBER, GGMLType
from qexp.checkpoints.regular_file import FileState, open_regular
from qexp.checkpoints.tensor_entry import MAX_DIMENSIONS, FileHeader, TensorEntry
from qexp.errors import LoadError

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # 1 had shorter counts; 3 only added files in the other byte order
DEFAULT_ALIGNMENT = 32
ALIGNMENT_KEY = "general.alignment"
ORIGINAL_SHAPE_KEY = "comfy.gguf.orig_shape."  # and the name of the tensor
MAX_HEADER_BYTES = 100_000_000  # a tokenizer with 256,000 words takes ten

# the types of metadata: number in the file -> format of `struct` and of `array`
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
UINT32, BOOL, STRING, ARRAY = 4, 7, 8, 9


def read_gguf_header(file: Path) -> FileHeader:
    """Read and parse the header of a GGUF file. Raises LoadError if it is damaged."""
    with open_regular(file) as (stream, state):
        return parse_gguf_header(file, stream, state)


def parse_gguf_header(file: Path, stream: BufferedReader, state: FileState) -> FileHeader:
    """Parse the header of an open file: tensors in the order of their bytes, and metadata.

    An entry's dtype is safetensors' name for plain numbers, else "GGUF_" and the block type ("GGUF_Q4_0"). Its shape is
    the dense tensor's, [out, in].
    Raises: LoadError if the header is damaged.
    """
    refuse_foreign(file, stream)
    refuse_other_format(file, stream, wants_gguf=True)
    return _Header(file, stream, state).read()


class _Header:
    """One pass over a header. Every method continues where the previous one stopped."""

    def __init__(self, file: Path, stream: BinaryIO, state: FileState) -> None:
        self.file, self.stream, self.state, self.size = file, stream, state, state.size
        self.limit = min(self.size, MAX_HEADER_BYTES)
        self.position = 0

    def read(self) -> FileHeader:
        if self.take(min(4, self.size), "its first bytes") != MAGIC:
            raise LoadError(f"'{self.file}' is not a GGUF file: it does not start with GGUF; download it again")
        self._check_version(self.number("I", "its version"))
        tensors = self.count(24, "tensors")  # 24 bytes: one with an empty name and no dimension
        fields = self.count(13, "metadata fields")
        metadata: dict[str, Any] = {}
        for _ in range(fields):
            key = self.string("a metadata key")
            if key in metadata:
                raise self.damaged(f"metadata key {brief(key)} is there twice")
            metadata[key] = self.value(key)
        infos: dict[str, tuple[GGMLType, tuple[int, ...], int]] = {}
        for _ in range(tensors):
            name = self.string("a tensor's name")
            if name in infos:
                raise self.damaged(f"tensor {brief(name)} is there twice")
            infos[name] = self.tensor(name)
        alignment = metadata.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
        start = _aligned(self.position, alignment)
        entries = self._entries(infos, start, alignment)
        return FileHeader(tuple(self._in_original_shape(entry, metadata) for entry in entries), metadata, start)

    def _check_version(self, version: int) -> None:
        if version in VERSIONS:
            return
        why = "in the other byte order" if version & 0xFFFF == 0 else "not supported"
        raise LoadError(f"'{self.file}' is GGUF version {version}, {why}; convert it to version {VERSIONS[-1]}")

    def take(self, count: int, what: str) -> bytes:
        if count > self.limit - self.position:
            where = f"larger than {MAX_HEADER_BYTES} bytes" if self.limit < self.size else f"{self.size} bytes long"
            raise self.damaged(f"{what} would go to byte {self.position + count} of a header that is {where}")
        data = self.stream.read(count)
        self.position += count
        if len(data) < count:
            raise self.damaged("it became shorter while it was read")
        return data

    def number(self, code: str, what: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0]

    def count(self, least_bytes: int, what: str) -> int:
        """Read a count of items that take at least `least_bytes` each."""
        count: int = self.number("Q", f"the number of {what}")
        if count > (self.limit - self.position) // least_bytes:
            raise self.damaged(f"it declares {count} {what}, more than fit into the file")
        return count

    def string(self, what: str) -> str:
        data = self.take(self.number("Q", what), what)
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise self.damaged(f"{what} is not UTF-8: {brief(data)}") from None

    def value(self, key: str) -> Any:
        what = f"the value of {brief(key)}"
        kind = self.number("I", what)
        if key == ALIGNMENT_KEY:
            alignment = self.number("I", what)
            if kind != UINT32 or alignment == 0 or alignment & (alignment - 1):
                raise self.damaged(f"{key} is {alignment} of type {kind}, not a power of two of type {UINT32}")
            return alignment
        if kind == STRING:
            return self._text(what)
        if kind == ARRAY:
            return self._array(self.number("I", what), what)
        return self.number(self._format(kind, what), what)

    def _format(self, kind: int, what: str) -> str:
        if kind not in SCALARS:
            raise self.damaged(f"{what} has the unknown type {kind}")
        return SCALARS[kind]

    def _text(self, what: str) -> str:
        """Read a string that need not be UTF-8: tokens of a vocabulary may be parts of a character."""
        return self.take(self.number("Q", what), what).decode(errors="surrogateescape")

    def _array(self, kind: int, what: str) -> list[str] | array[Any]:
        if kind == STRING:
            return [self._text(what) for _ in range(self.count(8, f"strings of {what}"))]
        code = "B" if kind == BOOL else self._format(kind, what)
        numbers = array(code)
        numbers.frombytes(self.take(self.count(numbers.itemsize, f"numbers of {what}") * numbers.itemsize, what))
        return numbers

    def tensor(self, name: str) -> tuple[GGMLType, tuple[int, ...], int]:
        """Read the type, shape and offset of a tensor, which follow its name."""
        dimensions = self.number("I", f"tensor {brief(name)}")
        if dimensions > MAX_DIMENSIONS:
            raise self.damaged(f"tensor {brief(name)} has {dimensions} dimensions, more than {MAX_DIMENSIONS}")
        shape = tuple(self.number("Q", f"tensor {brief(name)}") for _ in range(dimensions))[::-1]
        number = self.number("I", f"tensor {brief(name)}")
        if number not in BY_NUMBER:
            known = ", ".join(kind.name for kind in BY_NUMBER.values())
            raise LoadError(
                f"tensor {brief(name)} of '{self.file}' has the type number {number}; known are {known}: convert it, "
                "or download it again"
            )
        kind = BY_NUMBER[number]
        if any(size >= 2**62 for size in shape) or math.prod(shape) >= 2**62 or (shape or (1,))[-1] % kind.block:
            raise self.damaged(f"tensor {brief(name)} has shape {brief(shape)}, impossible for type {kind.name}")
        return kind, shape, self.number("Q", f"tensor {brief(name)}")

    def _entries(
        self, infos: Mapping[str, tuple[GGMLType, tuple[int, ...], int]], start: int, alignment: int
    ) -> tuple[TensorEntry, ...]:
        entries: list[TensorEntry] = []
        end = self.position
        for name, (kind, shape, offset) in sorted(infos.items(), key=lambda item: _place(*item[1])):
            expected = _aligned(end, alignment) - start
            if offset != expected:
                raise self.damaged(f"tensor {brief(name)} starts at byte {offset} of the data, not at {expected}")
            dtype = kind.name if kind.block == 1 else BLOCKED_PREFIX + kind.name
            place = (self.file, start + offset, kind.nbytes(shape))
            entries.append(TensorEntry(name, dtype, shape, *place, state=self.state))
            end = start + offset + entries[-1].nbytes
        if not end <= self.size <= _aligned(end, alignment):
            kind_of_damage = "truncated" if self.size < end else "damaged"
            raise LoadError(
                f"'{self.file}' is {kind_of_damage}: its header describes {end} bytes, the file has {self.size}; "
                "download it again"
            )
        return tuple(entries)

    def _in_original_shape(self, entry: TensorEntry, metadata: Mapping[str, Any]) -> TensorEntry:
        """Return the tensor in the shape given by its metadata. Raises LoadError if the number of values differs."""
        key = ORIGINAL_SHAPE_KEY + entry.name
        if key not in metadata:
            return entry
        shape = metadata[key]
        is_shape = isinstance(shape, array) and shape.typecode not in "fd" and min(shape, default=0) >= 0
        if not is_shape or len(shape) > MAX_DIMENSIONS or math.prod(shape) != math.prod(entry.shape):
            raise self.damaged(f"{brief(key)} is {brief(shape)}, but the tensor has {math.prod(entry.shape)} values")
        return replace(entry, shape=tuple(shape))

    def damaged(self, what: str) -> LoadError:
        return LoadError(f"'{self.file}' is damaged: {what}; download it again")


def _place(kind: GGMLType, shape: tuple[int, ...], offset: int) -> tuple[int, int]:
    return offset, kind.nbytes(shape)  # an empty tensor before the one that starts where it does


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment
