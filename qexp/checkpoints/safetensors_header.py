"""The header of a safetensors file.

A file is an 8-byte little-endian header length, a JSON header {name: {dtype, shape, data_offsets}, "__metadata__":
{...}}, then the tensors' bytes. Every size and offset is validated here before memory is allocated for it.

Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from io import BufferedReader
from pathlib import Path
from reprlib import repr as brief
from typing import Any

from qexp.checkpoints.foreign_files import refuse_foreign, refuse_other_format
from qexp.checkpoints.regular_file import FileState
from qexp.checkpoints.tensor_entry import DTYPE_BYTES, MAX_DIMENSIONS, FileHeader, TensorEntry
from qexp.errors import LoadError, WrongFileError

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library


def parse_safetensors_header(file: Path, stream: BufferedReader, state: FileState) -> FileHeader:
    """Parse the header of an open file. Raises LoadError if the file is damaged or not in this format."""
    refuse_foreign(file, stream)
    refuse_other_format(file, stream, wants_gguf=False)
    length_bytes = stream.read(8)
    length = int.from_bytes(length_bytes, "little")
    if len(length_bytes) < 8 or length > min(MAX_HEADER_BYTES, state.size - 8):
        if file.suffix.lower() not in (".safetensors", ".sft"):
            raise WrongFileError(
                f"'{file}' is not a checkpoint (neither safetensors nor GGUF); give a .safetensors or .gguf file, or a "
                "folder with config.json and weights"
            )
        raise LoadError(
            f"'{file}' is not a safetensors file, or truncated: header length {length}, file size {state.size}; "
            "download it again"
        )
    raw = stream.read(length)
    try:
        header = json.loads(raw.decode(), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise LoadError(
            f"'{file}' is not a safetensors file: its header is not JSON ({error}); download it again"
        ) from None
    if not isinstance(header, dict):
        raise LoadError(f"'{file}' is not a safetensors file: its header is not a JSON object; download it again")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _file_error(file, "__metadata__ must map names to strings")
    start = 8 + len(raw)
    entries = sorted(
        (_entry(file, name, info, start, state) for name, info in header.items()), key=lambda e: (e.offset, e.nbytes)
    )
    end = start
    for entry in entries:
        if entry.offset != end:
            raise _file_error(file, f"tensor '{entry.name}' starts at byte {entry.offset}, not at {end}")
        end = entry.offset + entry.nbytes
    if end != state.size:
        kind = "truncated" if state.size < end else "damaged"
        raise LoadError(
            f"'{file}' is {kind}: its header describes {end} bytes, the file has {state.size}; download it again"
        )
    return FileHeader(tuple(entries), metadata, start)


def _entry(file: Path, name: str, info: object, start: int, state: FileState) -> TensorEntry:
    if not isinstance(info, dict) or set(info) != {"dtype", "shape", "data_offsets"}:
        raise _file_error(file, f"tensor '{name}' must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        known = ", ".join(DTYPE_BYTES)
        raise LoadError(
            f"tensor '{name}' of '{file}' has dtype {brief(dtype)}; known are {known}: convert it, or download it again"
        )
    if not _are_naturals(shape) or not _are_naturals(offsets) or len(offsets) != 2 or len(shape) > MAX_DIMENSIONS:
        raise _file_error(
            file,
            f"tensor '{name}' has shape {brief(shape)} and data_offsets {brief(offsets)}, which must be a list of at "
            f"most {MAX_DIMENSIONS} integers >= 0 and one of two",
        )
    needed, found = math.prod(shape) * DTYPE_BYTES[dtype], offsets[1] - offsets[0]
    if needed != found:
        raise _file_error(file, f"tensor '{name}' of shape {shape} and dtype {dtype} needs {needed} bytes, not {found}")
    return TensorEntry(name, dtype, tuple(shape), file, start + offsets[0], needed, state=state)


def _file_error(file: Path, what: str) -> LoadError:
    return LoadError(f"'{file}' is damaged: {what}; download it again")


def _are_naturals(value: object) -> bool:
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 2**62 for number in value)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name is there twice")
    "".join(result).encode()  # raises UnicodeEncodeError, a ValueError, for half a surrogate pair
    return result
