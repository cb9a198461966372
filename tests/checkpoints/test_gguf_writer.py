"""GGUF files that are written: gguf-py's bytes, read back equal, whole or not at all."""

from array import array
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from qexp.checkpoints.gguf_header import read_gguf_header
from qexp.checkpoints.gguf_types import TYPES
from qexp.checkpoints.gguf_writer import GGUFTensorInfo, write_gguf
from qexp.errors import DiskError
from tests.checkpoints.test_gguf_header import random_bytes


def write(path: Path, tensors: dict[str, tuple[str, tuple[int, ...], bytes]], **options: Any) -> Path:
    infos = [GGUFTensorInfo(name, kind, shape) for name, (kind, shape, _) in tensors.items()]
    write_gguf(path, infos, lambda info: tensors[info.name][2], **{"architecture": "x", **options})
    return path


def test_a_written_file_is_the_librarys_byte_for_byte(tmp_path: Path) -> None:
    blocks, plain = random_bytes(3, 36), np.arange(10, dtype=np.float32).reshape(2, 5)
    metadata = {"x.name": "ö", "x.count": 7, "x.size": 2**40, "x.share": 0.5, "x.tenth": 0.1, "x.flag": True}
    writer = gguf.GGUFWriter(tmp_path / "library.gguf", "flux")
    writer.add_uint32("general.quantization_version", 2)
    kinds = ("string", "uint32", "uint64", "float32", "float64", "bool")
    for (key, value), kind in zip(metadata.items(), kinds, strict=True):
        getattr(writer, f"add_{kind}")(key, value)
    writer.add_array("x.words", ["a", "b c"])
    writer.add_tensor("q", blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.add_tensor("p", plain)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensors = {"q": ("Q4_0", (3, 64), blocks.tobytes()), "p": ("F32", (2, 5), plain.tobytes())}
    metadata["x.words"] = ["a", "b c"]
    path = write(tmp_path / "mine.gguf", tensors, architecture="flux", metadata=metadata)
    assert path.read_bytes() == (tmp_path / "library.gguf").read_bytes()


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]] = {
        name: (name, (3, 2 * kind.block), random_bytes(kind.nbytes((3, 2 * kind.block))).tobytes())
        for name, kind in TYPES.items()
    }
    tensors |= {
        "scalar": ("F32", (), bytes(4)),
        "empty": ("F16", (0, 4), b""),
        "conv": ("F32", (2, 1, 3, 1), bytes(24)),
    }
    metadata: dict[str, Any] = {"int32": -5, "int64": -(2**40), "float": float("inf"), "empty": ""}
    metadata |= {"integers": [1, 2], "floats": [1.5, 0.1], "bools": [True, False], "general.architecture": "y"}
    metadata["array"] = array("h", [-1, 2])
    path = write(tmp_path / "x.gguf", tensors, metadata=metadata)
    header, content = read_gguf_header(path), path.read_bytes()
    assert {entry.name for entry in header.entries} == set(tensors)
    for entry in header.entries:
        kind, shape, data = tensors[entry.name]
        assert (entry.dtype.removeprefix("GGUF_"), entry.shape) == (kind, shape)
        assert content[entry.offset : entry.offset + entry.nbytes] == data
    read = {name: list(v) if isinstance(v, array) else v for name, v in header.metadata.items()}
    assert read == {**metadata, "array": [-1, 2], "general.quantization_version": 2}
    assert gguf.GGUFReader(path).get_field("array").contents() == [-1, 2]  # type: ignore[union-attr]


def test_numbers_get_the_narrowest_type_that_holds_them(tmp_path: Path) -> None:
    values = {"UINT32": 2**32 - 1, "INT32": -1, "UINT64": 2**32, "INT64": -(2**31) - 1, "FLOAT32": float("nan"),
              "FLOAT64": 1e39, "BOOL": False}  # fmt: skip
    path = write(tmp_path / "x.gguf", {}, metadata=values)
    fields = gguf.GGUFReader(path).fields
    assert {name: fields[name].types[0].name for name in values} == {name: name for name in values}


def test_one_tensor_at_a_time_is_asked_for_in_order(tmp_path: Path) -> None:
    events: list[str] = []

    class Data(bytearray):
        def __del__(self) -> None:
            events.append("gone")

    def read(info: GGUFTensorInfo) -> Data:
        events.append(info.name)
        return Data(4000)

    infos = [GGUFTensorInfo(name, "F32", (1000,)) for name in "cab"]
    write_gguf(tmp_path / "x.gguf", infos, read, architecture="x")
    assert events == ["c", "gone", "a", "gone", "b", "gone"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", {"a": ("F32", (2,), bytes(8))})
    before = path.read_bytes()
    with pytest.raises(ValueError, match="'b' has 7 bytes, but 8 were announced"):
        write(path, {"a": ("F32", (2,), bytes(8)), "b": ("F32", (2,), bytes(7))})
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["x.gguf"]
    with pytest.raises(DiskError):
        write(Path("/dev/full/x.gguf"), {})


def test_what_the_format_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'a' of shape \[2, 48\] is not made of whole blocks of Q4_0"):
        GGUFTensorInfo("a", "Q4_0", (2, 48))
    twice = [GGUFTensorInfo("a", "F32", (2,))] * 2
    with pytest.raises(ValueError, match="same name"):
        write_gguf(tmp_path / "x.gguf", twice, lambda info: bytes(8), architecture="x")
    for value in (None, {"a": 1}, [], [1, "a"], [1, 2.5], 2**64, [None], b"x"):
        with pytest.raises(ValueError, match="metadata key="):
            write(tmp_path / "x.gguf", {}, metadata={"key": value})
    with pytest.raises(ValueError, match=r"general\.alignment cannot be chosen"):
        write(tmp_path / "x.gguf", {}, metadata={"general.alignment": 64})
    assert not list(tmp_path.iterdir())
