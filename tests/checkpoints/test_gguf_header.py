"""Headers of GGUF files: they agree with gguf-py's reading, and damage is refused with file and remedy."""

import io
import os
import random
import resource
import struct
from array import array
from pathlib import Path

import gguf
import numpy as np
import pytest

from qexp.checkpoints.gguf_header import MAX_HEADER_BYTES, _Header, read_gguf_header
from qexp.checkpoints.gguf_types import DECODABLE, TYPES
from qexp.checkpoints.regular_file import FileState
from qexp.checkpoints.tensor_entry import FileHeader
from qexp.errors import LoadError
from tests.fresh_process import imported_by
from tests.loading.gguf_files import finish

METADATA_TYPES = {
    "uint8": 200, "int8": -3, "uint16": 60_000, "int16": -300, "uint32": 4_000_000_000, "int32": -70_000,
    "uint64": 2**63 + 1, "int64": -(2**62), "float32": 0.1, "float64": 0.1, "bool": True, "string": "ключ\n",
}  # fmt: skip


def random_bytes(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def write_with_library(path: Path, alignment: int = 32) -> Path:
    """Every type of metadata and of tensors, 0 to 4 dimensions, an empty tensor, unusual names."""
    writer = gguf.GGUFWriter(path, "test")
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    for name, value in METADATA_TYPES.items():
        getattr(writer, f"add_{name}")(f"x.{name}", value)
    writer.add_array("x.words", ["a", "", "ö"])
    writer.add_array("x.numbers", [1, -2, 3])
    writer.add_array("x.fractions", [0.5, -0.25])
    writer.add_array("x.flags", [True, False])
    for name in DECODABLE:
        kind = gguf.GGMLQuantizationType[name]
        writer.add_tensor(f"blocks.{name}.weight", random_bytes(3, 2 * TYPES[name].block_bytes), raw_dtype=kind)
    for dtype in (np.float32, np.float16, np.float64, np.int8, np.int16, np.int32, np.int64):
        writer.add_tensor(f"plain.{np.dtype(dtype).name}", np.arange(15, dtype=dtype).reshape(3, 5))
    writer.add_tensor("bf16", random_bytes(3, 10), raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.add_tensor("conv", np.arange(2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5))
    writer.add_tensor("ein langer Name." * 10, np.ones(7, np.float32))
    writer.add_tensor("scalar", np.float32(3).reshape(()))
    return finish(writer, path)


@pytest.mark.parametrize("alignment", [32, 8, 4096])
def test_headers_agree_with_the_library(alignment: int, tmp_path: Path) -> None:
    path = write_with_library(tmp_path / "x.gguf", alignment)
    header, content, reader = read_gguf_header(path), path.read_bytes(), gguf.GGUFReader(path)
    assert header.nbytes == reader.data_offset
    assert [entry.name for entry in header.entries] == [tensor.name for tensor in reader.tensors]
    for entry, tensor in zip(header.entries, reader.tensors, strict=True):
        kind = tensor.tensor_type.name
        assert entry.dtype == (f"GGUF_{kind}" if kind in DECODABLE else kind)
        assert entry.shape == tuple(reversed(tensor.shape.tolist()))
        assert (entry.offset, entry.nbytes, entry.file) == (tensor.data_offset, tensor.n_bytes, path)
        assert content[entry.offset : entry.offset + entry.nbytes] == tensor.data.tobytes()
    library = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    mine = {name: list(v) if isinstance(v, array) else v for name, v in header.metadata.items()}
    assert mine == library
    assert {f"x.{name}" for name in METADATA_TYPES} < set(mine)


def test_words_that_are_parts_of_a_character_are_kept(tmp_path: Path) -> None:
    words = [b"\xe2\x82".decode(errors="surrogateescape"), "€"]
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "x")
    writer.add_array("words", [word.encode(errors="surrogateescape") for word in words])
    finish(writer)
    assert read_gguf_header(tmp_path / "x.gguf").metadata["words"] == words


def test_nothing_heavy_is_imported_to_read_a_header(tmp_path: Path) -> None:
    path = write_with_library(tmp_path / "x.gguf")
    code = "import pathlib, sys; from qexp.checkpoints.gguf_header import read_gguf_header as read"
    assert {"torch", "numpy", "gguf"}.isdisjoint(imported_by(f"{code}; read(pathlib.Path(sys.argv[1]))", path))


# Damage


def refused(path: Path, *words: str) -> None:
    """LoadError with these words; the message is short, names the file, and says what to do."""
    with pytest.raises(LoadError) as caught:
        read_gguf_header(path)
    message = str(caught.value)
    assert all(word in message for word in (str(path), *words)), message
    assert any(remedy in message for remedy in ("download", "convert", "put it there", "put the ")), message
    assert len(message) < 1000


def text(value: str | bytes) -> bytes:
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def field(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str | bytes, dimensions: list[int], number: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, number, offset)


NAME = field("general.name", 8, text("x"))
A, B = tensor("a", [32, 2], 2, 0), tensor("b", [5], 0, 64)  # Q4_0: 36 bytes; F32: 20 bytes


def file_bytes(
    fields: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    *,
    version: bytes = struct.pack("<I", 3),
    counts: tuple[int, int] | None = None,
    data: int = 64 + 20,
    alignment: int = 32,
) -> bytes:
    fields, tensors = [NAME] if fields is None else fields, [A, B] if tensors is None else tensors
    counts = counts or (len(tensors), len(fields))
    header = b"GGUF" + version + struct.pack("<QQ", *counts) + b"".join(fields + tensors)
    return header + bytes(-len(header) % alignment + data)


GOOD = file_bytes()
HUGE = 2**63
DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "another format": (b"\x08\x00\x00\x00\x00\x00\x00\x00{}", "holds safetensors"),
    "the magic alone": (b"GGUF", "its version"),
    "version 1": (file_bytes(version=struct.pack("<I", 1)), "version 1, not supported"),
    "version 4": (file_bytes(version=struct.pack("<I", 4)), "version 4, not supported"),
    "the other byte order": (file_bytes(version=struct.pack(">I", 3)), "in the other byte order"),
    "too many tensors": (file_bytes(counts=(HUGE, 1)), f"it declares {HUGE} tensors"),
    "too many fields": (file_bytes(counts=(2, HUGE)), f"it declares {HUGE} metadata fields"),
    "a tensor that is not there": (file_bytes(counts=(3, 1)), "damaged"),
    "a tensor that is not counted": (file_bytes(counts=(1, 1)), "damaged"),
    "no tensor counted": (file_bytes(counts=(0, 1)), "damaged"),
    "a field that is not counted": (file_bytes(counts=(2, 0)), "damaged"),
    "a key that is too long": (file_bytes([struct.pack("<Q", HUGE) + b"x"]), "a metadata key would go to byte"),
    "a key that is not UTF-8": (file_bytes([field(b"\xff", 4, bytes(4))]), "is not UTF-8"),
    "a key twice": (file_bytes([NAME, NAME]), "'general.name' is there twice"),
    "a value that is too long": (file_bytes([field("k", 8, struct.pack("<Q", HUGE))]), "the value of 'k'"),
    "a value of no type": (file_bytes([field("k", 13, bytes(8))]), "has the unknown type 13"),
    "too many numbers": (file_bytes([field("k", 9, struct.pack("<IQ", 4, HUGE))]), f"{HUGE} numbers"),
    "too many words": (file_bytes([field("k", 9, struct.pack("<IQ", 8, HUGE))]), f"{HUGE} strings"),
    "words that are too long": (file_bytes([field("k", 9, struct.pack("<IQQ", 8, 1, HUGE))]), "the value of 'k'"),
    "an array of no type": (file_bytes([field("k", 9, struct.pack("<IQ", 99, 1))]), "has the unknown type 99"),
    "an array of arrays": (file_bytes([field("k", 9, struct.pack("<IQ", 9, 1))]), "has the unknown type 9"),
    "alignment zero": (file_bytes([field("general.alignment", 4, struct.pack("<I", 0))]), "not a power of two"),
    "alignment 48": (file_bytes([field("general.alignment", 4, struct.pack("<I", 48))]), "not a power of two"),
    "alignment of another type": (file_bytes([field("general.alignment", 5, struct.pack("<i", 32))]), "of type 5"),
    "alignment huge": (file_bytes([field("general.alignment", 4, struct.pack("<I", 2**31))]), "damaged"),
    "a name that is too long": (file_bytes(None, [struct.pack("<Q", HUGE), B]), "a tensor's name would go"),
    "a name that is not UTF-8": (file_bytes(None, [tensor(b"\xff", [32, 2], 2, 0), B]), "is not UTF-8"),
    "a name twice": (file_bytes(None, [A, tensor("a", [5], 0, 64)]), "'a' is there twice"),
    "many dimensions": (file_bytes(None, [tensor("a", [1] * 65, 0, 0), B]), "has 65 dimensions"),
    "dimensions without end": (file_bytes(None, [text("a") + struct.pack("<I", 2**32 - 1), B]), "dimensions"),
    "a dimension huge": (file_bytes(None, [tensor("a", [2**63], 0, 0), B]), "impossible for type"),
    "dimensions that would overflow": (file_bytes(None, [tensor("a", [2**32, 2**32], 0, 0), B]), "impossible for type"),
    "a row of half a block": (file_bytes(None, [tensor("a", [48, 2], 2, 0), B]), "impossible for type"),
    "a type of old": (file_bytes(None, [tensor("a", [32, 2], 4, 0), B]), "has the type number 4; known are"),
    "a type to come": (file_bytes(None, [tensor("a", [32, 2], 99, 0), B]), "has the type number 99"),
    "an offset that is not aligned": (file_bytes(None, [A, tensor("b", [5], 0, 65)]), "starts at byte 65"),
    "an overlap": (file_bytes(None, [A, tensor("b", [5], 0, 32)]), "starts at byte 32 of the data, not at 64"),
    "the same bytes": (file_bytes(None, [A, tensor("b", [5], 0, 0)]), "damaged"),
    "a gap": (file_bytes(None, [A, tensor("b", [5], 0, 96)], data=116), "starts at byte 96 of the data, not at 64"),
    "beyond the file": (file_bytes(None, [A, tensor("b", [5], 0, 2**40)]), "starts at byte"),
    "beyond 64 bits": (file_bytes(None, [A, tensor("b", [5], 0, 2**64 - 32)]), "starts at byte"),
    "larger than the file": (file_bytes(None, [A, tensor("b", [2**40], 0, 64)]), "truncated"),
    "one byte short": (GOOD[:-1], "truncated"),
    "bytes behind the tensors": (GOOD + bytes(64), "damaged: its header describes"),
}


@pytest.mark.parametrize(("content", "words"), DAMAGED.values(), ids=list(DAMAGED))
def test_damage_is_refused(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    refused(path, words)


def test_the_file_that_the_damaged_ones_are_made_of_is_good(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    for content in (GOOD, GOOD + bytes(12)):  # the last tensor may be padded or not
        path.write_bytes(content)
        a, b = read_gguf_header(path).entries
        assert (a.dtype, a.shape, a.nbytes) == ("GGUF_Q4_0", (2, 32), 36)
        assert (b.dtype, b.shape, b.nbytes, b.offset) == ("F32", (5,), 20, a.offset + 64)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    for length in range(len(GOOD)):
        path.write_bytes(GOOD[:length])
        refused(path)


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="became shorter while it was read; download"):
        _Header(tmp_path / "x.gguf", io.BytesIO(GOOD[:40]), FileState(0, 0, len(GOOD), 0, 0)).read()


def mutated(good: bytes, described: int, random_: random.Random) -> bytes:
    """Bytes changed, bits flipped, numbers made huge, parts removed, doubled or cut off; mostly in the header."""
    content = bytearray(good)
    for _ in range(random_.choice((1, 1, 1, 2, 4))):
        if not content:
            break
        place = random_.randrange(min(described, len(content)) if random_.random() < 0.9 else len(content))
        end = place + random_.randrange(1, 9)
        new = [
            bytes([content[place] ^ 1 << random_.randrange(8)]) + content[place + 1 : end],
            random_.randbytes(end - place),
            b"\xff" * (end - place),
            bytes(end - place),
            b"",
            content[place:end] * 2,
        ]
        content[place:end] = random_.choice(new)
        if random_.random() < 0.05:
            del content[place:]
    return bytes(content)


def test_mutations_are_refused_or_harmless(tmp_path: Path) -> None:
    """1,500 seeded mutations of good files: LoadError, or entries that lie inside the file, one behind the other."""
    path, random_, refusals = tmp_path / "x.gguf", random.Random(0), 0
    large = write_with_library(tmp_path / "large.gguf")
    files = [(GOOD, len(GOOD) - 84), (large.read_bytes(), read_gguf_header(large).nbytes)]
    for number in range(1500):
        path.write_bytes(mutated(*files[number % 2], random_))
        try:
            header = read_gguf_header(path)
        except LoadError as error:
            refusals += 1
            assert str(path) in str(error) and len(str(error)) < 1000
            continue
        check_places(header, path.stat().st_size)
    assert refusals > 700


def check_places(header: FileHeader, size: int) -> None:
    end = header.nbytes
    for entry in header.entries:
        kind = TYPES[entry.dtype.removeprefix("GGUF_")]
        assert entry.offset >= end and entry.nbytes == kind.nbytes(entry.shape)
        end = entry.offset + entry.nbytes
    assert not header.entries or end <= size


@pytest.mark.own_process
def test_no_memory_is_reserved_for_what_a_damaged_header_announces(tmp_path: Path) -> None:
    """In a sparse file of 8 GB, so that only the limit of a header stands against the numbers."""
    path = tmp_path / "x.gguf"
    announced = 7_000_000_000
    contents = [
        file_bytes([field("k", 8, struct.pack("<Q", announced))]),
        file_bytes([field("k", 9, struct.pack("<IQ", 10, announced // 8))]),
        file_bytes([field("k", 9, struct.pack("<IQ", 8, announced // 8))]),
        file_bytes(None, [struct.pack("<Q", announced)]),
        file_bytes(counts=(announced // 24, 0)),
    ]
    path.write_bytes(contents[0])
    refused(path)  # what an error needs is imported, which may take memory of its own
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for content in contents:
        path.write_bytes(content)
        os.truncate(path, 8_000_000_000)
        refused(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 * 1024  # KiB
    assert announced > MAX_HEADER_BYTES


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe"])
def test_what_is_no_readable_file_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    refused(path)
