"""Writing GGUF files, one tensor in memory at a time. Imports no torch; `gguf_header.py` describes the format.

The header needs types and shapes alone, so it is written first; then each tensor is asked for, written, and forgotten.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from qexp.checkpoints.gguf_header import ALIGNMENT_KEY, ARRAY, BOOL, DEFAULT_ALIGNMENT, MAGIC, SCALARS, STRING, VERSIONS
from qexp.checkpoints.gguf_types import TYPES
from qexp.system.files import replacing

QUANTIZATION_VERSION = 2  # of the block formats, as ggml counts
_NUMBERS = {code: number for number, code in SCALARS.items() if code != "?"}


@dataclass(frozen=True)
class GGUFTensorInfo:
    """kind: a name of `gguf_types.TYPES`; shape: of the dense tensor, [out, in]."""

    name: str
    kind: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.shape and self.shape[-1] % TYPES[self.kind].block:
            raise ValueError(f"'{self.name}' of shape {list(self.shape)} is not made of whole blocks of {self.kind}")

    @property
    def nbytes(self) -> int:
        return TYPES[self.kind].nbytes(self.shape)


def write_gguf(
    path: Path,
    tensors: Sequence[GGUFTensorInfo],
    read: Callable[[GGUFTensorInfo], Any],
    *,
    architecture: str,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write a file, whole or not at all.

    read: tensor -> its bytes, as anything with a contiguous buffer; called in order, once for each.
    metadata: str, bool, int, float, lists of str, and lists or arrays of numbers. A number gets the narrowest of
    uint32, int32, uint64, int64, and of float32 and float64, that holds it exactly.
    Raises: ValueError for two tensors of one name, bytes of the wrong length, values that the format has no type for;
    DiskError for a disk that is full or not writable.
    """
    if len({tensor.name for tensor in tensors}) < len(tensors):
        raise ValueError("two tensors have the same name")
    fields: dict[str, Any] = {"general.architecture": architecture}
    if any(TYPES[tensor.kind].block > 1 for tensor in tensors):
        fields["general.quantization_version"] = QUANTIZATION_VERSION
    header = _header(tensors, fields | dict(metadata or {}))
    with replacing(path) as beside, beside.open("wb") as file:
        _write_padded(file, header)
        for tensor in tensors:
            data = memoryview(read(tensor))
            if data.nbytes != tensor.nbytes:
                raise ValueError(f"'{tensor.name}' has {data.nbytes} bytes, but {tensor.nbytes} were announced")
            _write_padded(file, data)
            del data


def _write_padded(file: BinaryIO, data: Any) -> None:
    file.write(data)
    file.write(bytes(-file.tell() % DEFAULT_ALIGNMENT))


def _header(tensors: Sequence[GGUFTensorInfo], fields: Mapping[str, Any]) -> bytes:
    if ALIGNMENT_KEY in fields:
        raise ValueError(f"{ALIGNMENT_KEY} cannot be chosen; it is {DEFAULT_ALIGNMENT}")
    parts = [MAGIC, struct.pack("<IQQ", VERSIONS[-1], len(tensors), len(fields))]
    parts += [_text(key) + _value(key, value) for key, value in fields.items()]
    offset = 0
    for tensor in tensors:
        dimensions = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape))
        parts.append(_text(tensor.name) + dimensions + struct.pack("<IQ", TYPES[tensor.kind].number, offset))
        offset += tensor.nbytes + -tensor.nbytes % DEFAULT_ALIGNMENT
    return b"".join(parts)


def _text(text: str) -> bytes:
    data = text.encode(errors="surrogateescape")
    return struct.pack("<Q", len(data)) + data


def _value(key: str, value: Any) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _text(value)
    if isinstance(value, (list, tuple, array)):
        return struct.pack("<I", ARRAY) + _array(key, value)
    code = _code(key, [value])
    return struct.pack("<I", BOOL if code == "?" else _NUMBERS[code]) + struct.pack("<" + code, value)


def _array(key: str, values: Sequence[Any] | array[Any]) -> bytes:
    if values and all(isinstance(value, str) for value in values):
        return struct.pack("<IQ", STRING, len(values)) + b"".join(map(_text, values))
    code = values.typecode if isinstance(values, array) else _code(key, values)
    number = BOOL if code == "?" else _NUMBERS[code]
    return struct.pack("<IQ", number, len(values)) + struct.pack(f"<{len(values)}{code}", *values)


def _code(key: str, values: Sequence[Any]) -> str:
    """The format of the narrowest type that holds all these numbers exactly."""
    kinds = {type(value) for value in values}
    if kinds == {bool}:
        return "?"
    if kinds == {float}:
        return "f" if all(_is_single(value) for value in values) else "d"
    if kinds == {int}:
        for code, low, high in (("I", 0, 2**32), ("i", -(2**31), 2**31), ("Q", 0, 2**64), ("q", -(2**63), 2**63)):
            if all(low <= value < high for value in values):
                return code
    raise ValueError(f"metadata {key}={values!r}: GGUF has no type that holds it")


def _is_single(value: float) -> bool:
    try:
        return struct.unpack("<f", struct.pack("<f", value))[0] == value or value != value
    except OverflowError:
        return False
