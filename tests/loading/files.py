"""Safetensors files written byte by byte, so that tests can write wrong ones too."""

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BYTES = {"F32": 4, "BF16": 2, "U8": 1, "I64": 8}


def write_file(path: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    """A header (JSON-able, or bytes as they are), then data; `length` is what the file says of the header's length."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def header_of(tensors: Mapping[str, tuple[str, list[int]]]) -> tuple[dict[str, Any], int]:
    """A correct header for {name: (dtype, shape)}, and the bytes of data that it describes."""
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    return header, end


def write_tensors(path: Path, tensors: Mapping[str, tuple[str, list[int]]]) -> Path:
    """A correct file whose bytes count up."""
    header, nbytes = header_of(tensors)
    return write_file(path, header, bytes(i % 251 for i in range(nbytes)))


def write_folder(
    folder: Path, shards: Mapping[str, Mapping[str, tuple[str, list[int]]]], config: object = None
) -> Path:
    """Shards with an index, and config.json; a single shard gets no index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({} if config is None else config))
    for name, tensors in shards.items():
        write_tensors(folder / name, tensors)
    if len(shards) > 1:
        write_index(folder, {tensor: name for name, tensors in shards.items() for tensor in tensors})
    return folder


def write_index(folder: Path, weight_map: object, name: str = "model.safetensors.index.json") -> Path:
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder / name
