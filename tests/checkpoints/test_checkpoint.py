"""Headers of checkpoints: what is there is found, and whatever a damaged file says is refused, with file and remedy."""

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from qexp.checkpoints.checkpoint import open_checkpoint
from qexp.checkpoints.dtypes import TORCH_DTYPES
from qexp.checkpoints.tensor_entry import DTYPE_BYTES
from qexp.errors import LoadError
from tests.fresh_process import imported_by, run_python
from tests.loading.files import header_of, write_file, write_folder, write_index, write_tensors

OPEN = "import sys; from qexp.checkpoints.checkpoint import open_checkpoint; open_checkpoint(sys.argv[1])"
TWO = {"a": ("F32", [2, 3]), "b": ("BF16", [4])}  # 24 + 8 bytes


def refused(path: Path, *words: str) -> str:
    """Opening `path` raises LoadError with these words; the message is short, and says what to do."""
    with pytest.raises(LoadError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert any(
        remedy in message for remedy in ("download", "put it there", "put the ", "set model.path", "keep one", "give a")
    )
    assert len(message) < 1000
    return message


def a_file(folder: Path) -> Path:
    return folder / "model.safetensors"


# What is there is found


def test_a_folder_with_one_file(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_folder(tmp_path, {"model.safetensors": TWO}, {"width": 3}))
    assert dict(checkpoint.config) == {"width": 3}
    assert checkpoint.files == (a_file(tmp_path),)
    assert checkpoint.nbytes == 32
    a, b = checkpoint.entries["a"], checkpoint.entries["b"]
    assert (a.dtype, a.shape, a.nbytes, a.file) == ("F32", (2, 3), 24, a_file(tmp_path))
    assert (b.dtype, b.shape, b.nbytes) == ("BF16", (4,), 8)
    content = a_file(tmp_path).read_bytes()
    assert content[a.offset : a.offset + a.nbytes] == bytes(range(24))
    assert content[b.offset : b.offset + b.nbytes] == bytes(range(24, 32))


def test_a_file_that_was_opened_before_is_read_again(tmp_path: Path) -> None:
    """Its header is parsed once, but only as long as it stays as it is, and the file as long as it was."""
    write_folder(tmp_path, {"model.safetensors": TWO}, {})
    first = open_checkpoint(tmp_path)
    first.metadata["own"] = "mine"  # type: ignore[index]
    assert open_checkpoint(tmp_path) == replace(first, metadata={})
    with a_file(tmp_path).open("ab") as stream:
        stream.write(bytes(1))
    refused(tmp_path, "describes")
    write_folder(tmp_path, {"model.safetensors": {"a": ("F32", [3, 2]), "b": ("BF16", [4])}}, {})
    assert open_checkpoint(tmp_path).entries["a"].shape == (3, 2)


def test_a_file_has_the_config_beside_it(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tensors(tmp_path / "any name.safetensors", TWO))
    assert dict(checkpoint.config) == {}
    assert set(checkpoint.entries) == {"a", "b"}
    (tmp_path / "config.json").write_text('{"width": 3}')
    assert dict(open_checkpoint(tmp_path / "any name.safetensors").config) == {"width": 3}


def test_shards_are_those_of_the_index(tmp_path: Path) -> None:
    write_folder(tmp_path, {"x-2.safetensors": {"b": ("BF16", [4])}, "x-1.safetensors": {"a": ("F32", [2])}})
    write_tensors(tmp_path / "other.safetensors", {"c": ("U8", [1])})  # not in the index
    checkpoint = open_checkpoint(str(tmp_path))
    assert [file.name for file in checkpoint.files] == ["x-1.safetensors", "x-2.safetensors"]
    assert {name: entry.file.name for name, entry in checkpoint.entries.items()} == {
        "a": "x-1.safetensors",
        "b": "x-2.safetensors",
    }


def test_a_standard_name_wins_over_files_beside_it(tmp_path: Path) -> None:
    write_folder(tmp_path, {"diffusion_pytorch_model.safetensors": TWO})
    write_tensors(tmp_path / "diffusion_pytorch_model.fp16.safetensors", TWO)
    assert [file.name for file in open_checkpoint(tmp_path).files] == ["diffusion_pytorch_model.safetensors"]


def test_links_are_followed(tmp_path: Path) -> None:
    """Caches of hubs keep files elsewhere."""
    write_tensors(tmp_path / "blob", TWO)
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "config.json").write_text("{}")
    (tmp_path / "snapshot" / "model.safetensors").symlink_to(tmp_path / "blob")
    assert set(open_checkpoint(tmp_path / "snapshot").entries) == {"a", "b"}


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
def test_agrees_with_safetensors(dtype: str, tmp_path: Path) -> None:
    """Names, dtypes, shapes and the bytes themselves; scalars, empty tensors and unusual names included."""
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape: int) -> torch.Tensor:
        raw = torch.randint(0, 2, (*shape, TORCH_DTYPES[dtype].itemsize), dtype=torch.uint8, generator=generator)
        return raw.view(TORCH_DTYPES[dtype]).reshape(shape)

    tensors = {"z": tensor(3, 5), "scalar": tensor(), "empty": tensor(0, 4), "ключ.\n": tensor(7), "a": tensor(1, 2, 3)}
    save_file(tensors, a_file(tmp_path), {"format": "pt"})
    entries, content = open_checkpoint(a_file(tmp_path)).entries, a_file(tmp_path).read_bytes()
    with safe_open(a_file(tmp_path), "pt") as opened:
        assert set(opened.keys()) == set(entries)
        for name, entry in entries.items():
            part = opened.get_slice(name)
            assert (entry.dtype, list(entry.shape)) == (part.get_dtype(), part.get_shape())
            raw = bytearray(content[entry.offset : entry.offset + entry.nbytes])
            expected = opened.get_tensor(name)
            assert entry.nbytes == expected.nbytes
            if raw:
                assert torch.equal(torch.frombuffer(raw, dtype=torch.uint8), expected.flatten().view(torch.uint8))


def test_torch_is_not_imported(tmp_path: Path) -> None:
    write_folder(tmp_path, {"model.safetensors": TWO})
    assert {"torch", "numpy"}.isdisjoint(imported_by(f"{OPEN}.content_hash()", tmp_path))


# Damaged files

GOOD, GOOD_BYTES = header_of(TWO)


def changed(**fields: object) -> dict[str, Any]:
    """The header of TWO with other values for tensor 'b', the second."""
    return {**GOOD, "b": {**GOOD["b"], **fields}}


DAMAGED_HEADERS: dict[str, object] = {
    "not JSON": b'{"a": ',
    "text behind the JSON": b"{} {}",
    "binary": bytes(range(128, 256)),
    "not UTF-8": json.dumps(GOOD).encode().replace(b'"b"', b'"\xff"'),
    "UTF-16": json.dumps(GOOD).encode("utf-16"),
    "half a surrogate pair": json.dumps(GOOD).encode().replace(b'"b"', b'"\\ud800"'),
    "nested deeply": b"[" * 200_000,
    "a tensor nested deeply": b'{"a": ' + b'{"a": ' * 200_000,
    "a list": [],
    "null": None,
    "a name twice": json.dumps(GOOD).encode().replace(b'"b"', b'"a"'),
    "a field twice": json.dumps(GOOD).encode().replace(b'"shape": [4]', b'"shape": [4], "shape": [4]'),
    "a number too long to read": b'{"a": ' + b"9" * 5000 + b"}",
    "a tensor that is a list": {**GOOD, "b": []},
    "a tensor that is null": {**GOOD, "b": None},
    "a field missing": {**GOOD, "b": {"dtype": "BF16", "shape": [4]}},
    "a field too many": changed(strides=[1]),
    "dtype unknown": changed(dtype="F7"),
    "dtype in lower case": changed(dtype="bf16"),
    "dtype null": changed(dtype=None),
    "dtype a list": changed(dtype=[["BF16"] * 1000]),
    "dtype without end": changed(dtype="B" * 100_000),
    "shape missing": changed(shape=None),
    "shape a string": changed(shape="4"),
    "shape a number": changed(shape=4),
    "shape negative": changed(shape=[-4]),
    "shape twice negative": changed(shape=[-2, -2]),
    "shape fractional": changed(shape=[4.5]),
    "shape a float": changed(shape=[4.0]),
    "shape a bool": changed(shape=[4, True]),
    "shape a string inside": changed(shape=["4"]),
    "shape null inside": changed(shape=[None]),
    "shape not a number": json.dumps(GOOD).encode().replace(b'"shape": [4]', b'"shape": [NaN]'),
    "shape infinite": json.dumps(GOOD).encode().replace(b'"shape": [4]', b'"shape": [1e999]'),
    "shape nested": changed(shape=[[4]]),
    "shape huge": changed(shape=[2**61]),
    "shape beyond 64 bits": changed(shape=[2**64 + 4]),
    "shape that would overflow": changed(shape=[2**32, 2**32]),
    "shape of many dimensions": changed(shape=[1] * 65 + [4]),
    "shape whose product takes for ever": changed(shape=[2**61] * 300_000),
    "shape too large": changed(shape=[5]),
    "shape too small": changed(shape=[3]),
    "offsets missing": changed(data_offsets=None),
    "one offset": changed(data_offsets=[24]),
    "three offsets": changed(data_offsets=[24, 32, 40]),
    "offsets negative": changed(data_offsets=[-8, 0]),
    "offsets a float": changed(data_offsets=[24.0, 32.0]),
    "offsets a bool": changed(data_offsets=[24, True]),
    "offsets backwards": changed(data_offsets=[32, 24]),
    "offsets equal": changed(data_offsets=[24, 24]),
    "an overlap": changed(data_offsets=[20, 28]),
    "the same bytes": changed(data_offsets=[16, 24]),
    "a gap": changed(data_offsets=[25, 33]),
    "beyond the file": changed(data_offsets=[2**40, 2**40 + 8]),
    "beyond 64 bits": changed(data_offsets=[2**64, 2**64 + 8]),
    "no first bytes": {"b": {**GOOD["b"], "data_offsets": [24, 32]}},
    "no last bytes": {"a": GOOD["a"]},
    "nothing described": {},
}


@pytest.mark.parametrize("header", DAMAGED_HEADERS.values(), ids=list(DAMAGED_HEADERS))
def test_a_damaged_header_is_refused(header: object, tmp_path: Path) -> None:
    file = write_file(a_file(tmp_path), header, bytes(GOOD_BYTES))
    message = refused(file, str(file))
    assert "download it again" in message


DAMAGED_FILES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda good: b"",
    "shorter than the length": lambda good: good[:7],
    "only the length": lambda good: good[:8],
    "cut in the header": lambda good: good[:40],
    "without data": lambda good: good[: 8 + int.from_bytes(good[:8], "little")],
    "one byte short": lambda good: good[:-1],
    "one byte long": lambda good: good + b"\0",
    "length 0": lambda good: bytes(8) + good[8:],
    "length one short": lambda good: (int.from_bytes(good[:8], "little") - 1).to_bytes(8, "little") + good[8:],
    "length one long": lambda good: (int.from_bytes(good[:8], "little") + 1).to_bytes(8, "little") + good[8:],
    "length of the whole file": lambda good: len(good).to_bytes(8, "little") + good[8:],
    "length 2**62": lambda good: (2**62).to_bytes(8, "little") + good[8:],
    "length -1": lambda good: b"\xff" * 8 + good[8:],
    "length above the limit": lambda good: (100_000_001).to_bytes(8, "little") + good[8:],
    "a pointer of Git LFS": lambda good: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    "zeros": lambda good: bytes(len(good)),
}


@pytest.mark.parametrize("damage", DAMAGED_FILES.values(), ids=list(DAMAGED_FILES))
def test_a_damaged_file_is_refused(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    file = write_tensors(a_file(tmp_path), TWO)
    file.write_bytes(damage(file.read_bytes()))
    assert "download it again" in refused(file, str(file))


def test_a_truncated_header_is_called_so(tmp_path: Path) -> None:
    file = write_tensors(a_file(tmp_path), TWO)
    length = int.from_bytes(file.read_bytes()[:8], "little")
    file.write_bytes(file.read_bytes()[:40])
    refused(file, "truncated", f"header length {length}, file size 40")


@pytest.mark.parametrize(("offsets", "nbytes"), [([16, 24], 24), ([25, 33], 33), ([20, 28], 28)])
def test_a_gap_or_an_overlap_that_ends_with_the_file(offsets: list[int], nbytes: int, tmp_path: Path) -> None:
    file = write_file(a_file(tmp_path), changed(data_offsets=offsets), bytes(nbytes))
    refused(file, str(file), "'b' starts at byte")


def test_an_unknown_dtype_is_named_beside_the_known_ones(tmp_path: Path) -> None:
    file = write_file(a_file(tmp_path), changed(dtype="F4"), bytes(GOOD_BYTES))
    refused(file, "'b'", "has dtype 'F4'", "known are BOOL, U8,", "convert it")


def test_truncated_data_is_called_so(tmp_path: Path) -> None:
    file = write_tensors(a_file(tmp_path), TWO)
    file.write_bytes(file.read_bytes()[:-3])
    size = file.stat().st_size
    refused(file, "truncated", f"describes {size + 3} bytes", f"has {size}")


def test_mutations_are_refused_or_harmless(tmp_path: Path) -> None:
    """400 seeded mutations of a good file: LoadError, or entries whose bytes lie inside the file."""
    good = write_tensors(tmp_path / "good.safetensors", {**TWO, "c": ("I64", [2]), "d": ("U8", [])}).read_bytes()
    described = 8 + int.from_bytes(good[:8], "little")
    file, random_, refusals = a_file(tmp_path), random.Random(0), 0
    for _ in range(400):
        content = bytearray(good)
        for _ in range(random_.choice((1, 1, 1, 2, 4))):
            place = random_.randrange(described if random_.random() < 0.9 else len(content))
            kind = random_.randrange(4)
            if kind == 0:
                content[place : place + 1] = bytes([random_.choice(b'0123456789-.eE,:[]{}"\\ntfu\x00\xff')])
            elif kind == 1:
                content[place] ^= 1 << random_.randrange(8)
            elif kind == 2:
                del content[place : place + random_.randrange(1, 9)]
            else:
                content[place:place] = content[place : place + random_.randrange(1, 9)]
        if random_.random() < 0.2:
            del content[random_.randrange(len(content)) :]
        file.write_bytes(content)
        try:
            checkpoint = open_checkpoint(file)
        except LoadError as error:
            refusals += 1
            assert str(file) in str(error) and len(str(error)) < 1000
            continue
        for entry in checkpoint.entries.values():
            assert 8 <= entry.offset <= entry.offset + entry.nbytes <= len(content)
        assert sum(entry.nbytes for entry in checkpoint.entries.values()) < len(content)
    assert 200 < refusals < 400  # the rest hit names, padding or data


# Folders


def test_what_is_not_there(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", str(tmp_path / "nowhere"), "give a folder with config.json")
    refused(tmp_path / ("x" * 300), "does not exist")
    refused(tmp_path, "has no weights; give a folder with one .safetensors or .gguf file")


def test_config_is_needed(tmp_path: Path) -> None:
    write_tensors(a_file(tmp_path), TWO)
    refused(tmp_path, "config.json", "No such file")


DAMAGED_JSON = {
    "cut": b"{",
    "a list": b"[]",
    "text": b'"text"',
    "empty": b"",
    "not UTF-8": b"\xff\xfe",
    "deep": b"[" * 100_000,
    "a long number": b'{"a": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("content", DAMAGED_JSON.values(), ids=list(DAMAGED_JSON))
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_damaged_json_is_refused(name: str, content: bytes, tmp_path: Path) -> None:
    write_folder(tmp_path, {"a.safetensors": {"a": ("U8", [1])}, "b.safetensors": {"b": ("U8", [1])}})
    (tmp_path / name).write_bytes(content)
    refused(tmp_path, str(tmp_path / name))


def test_json_is_read_as_utf8_whatever_the_locale(tmp_path: Path) -> None:
    write_folder(tmp_path, {"model.safetensors": TWO})
    (tmp_path / "config.json").write_bytes('{"name": "größe"}'.encode())
    run_python(OPEN, tmp_path, env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"})


def test_two_files_without_an_index(tmp_path: Path) -> None:
    write_folder(tmp_path, {"one.safetensors": TWO})
    write_tensors(tmp_path / "two.safetensors", TWO)
    several = r"several safetensors files \('one.safetensors', 'two.safetensors'\).*without their index"
    with pytest.raises(LoadError, match=several):
        open_checkpoint(tmp_path)


def test_two_indices(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a.safetensors": {"a": ("U8", [1])}, "b.safetensors": {"b": ("U8", [1])}})
    (tmp_path / "model.safetensors.index.json").rename(tmp_path / "one.safetensors.index.json")
    write_index(tmp_path, {"a": "a.safetensors"}, "two.safetensors.index.json")
    refused(tmp_path, "several indices", "'one.safetensors.index.json', 'two.safetensors.index.json'")


@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_something_else_in_place_of_a_file(name: str, kind: str, tmp_path: Path) -> None:
    """A pipe or a device would be waited for, or read, for ever."""
    write_folder(tmp_path, {"model.safetensors": TWO})
    (tmp_path / name).unlink()
    if kind == "folder":
        (tmp_path / name).mkdir()
    elif kind == "pipe":
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).symlink_to("/dev/zero")
    refused(tmp_path, str(tmp_path / name), "not a regular file")


def test_a_link_to_nowhere(tmp_path: Path) -> None:
    write_folder(tmp_path, {"model.safetensors": TWO})
    a_file(tmp_path).unlink()
    a_file(tmp_path).symlink_to(tmp_path / "gone")
    refused(tmp_path, str(a_file(tmp_path)), "No such file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read everything")
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_that_may_not_be_read(name: str, tmp_path: Path) -> None:
    write_folder(tmp_path, {"model.safetensors": TWO})
    (tmp_path / name).chmod(0)
    refused(tmp_path, str(tmp_path / name), "Permission denied")


def test_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a permission does to users who are not root, and a bad disk to everybody."""
    write_folder(tmp_path, {"model.safetensors": TWO})

    def fail(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", fail)
    refused(a_file(tmp_path), str(a_file(tmp_path)), "Permission denied")


# An index


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return write_folder(
        tmp_path / "model", {"x-1.safetensors": {"a": ("F32", [2])}, "x-2.safetensors": {"b": ("BF16", [4])}}
    )


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/etc/outside.safetensors", "sub/inside.safetensors", "./x-1.safetensors", "..", ".", "",
     "x-1.bin", "config.json", "x-1.safetensors/"],
    ids=repr,
)  # fmt: skip
def test_a_shard_must_be_a_safetensors_file_of_the_folder(name: str, shards: Path) -> None:
    write_tensors(shards.parent / "outside.safetensors", {"a": ("F32", [2])})
    (shards / "sub").mkdir()
    write_tensors(shards / "sub" / "inside.safetensors", {"a": ("F32", [2])})
    write_index(shards, {"a": name, "b": "x-2.safetensors"})
    refused(shards, "model.safetensors.index.json", repr(name), "in the same folder")


@pytest.mark.parametrize("value", [None, 1, True, ["x-1.safetensors"], {"x-1.safetensors": 1}], ids=repr)
def test_a_shard_must_be_text(value: object, shards: Path) -> None:
    write_index(shards, {"a": value, "b": "x-2.safetensors"})
    refused(shards, "model.safetensors.index.json", "'a'")


@pytest.mark.parametrize("weight_map", [{}, None, [], "x-1.safetensors"], ids=repr)
def test_an_index_without_a_map(weight_map: object, shards: Path) -> None:
    write_index(shards, weight_map)
    refused(shards, "model.safetensors.index.json", "weight_map")


@pytest.mark.parametrize(
    "name", ["x-3.safetensors", "x" * 300 + ".safetensors", "x\0.safetensors"], ids=["gone", "long", "zero"]
)
def test_a_missing_shard(name: str, shards: Path) -> None:
    write_index(shards, {"a": "x-1.safetensors", "b": name})
    with pytest.raises(LoadError, match="missing") as caught:
        open_checkpoint(shards)
    assert repr(name) in str(caught.value) and str(shards) in str(caught.value)


def test_a_tensor_in_two_shards_without_a_place_in_the_index_is_refused(shards: Path) -> None:
    write_tensors(shards / "x-2.safetensors", {"a": ("F32", [2]), "b": ("BF16", [4])})
    write_index(shards, {"b": "x-2.safetensors", "c": "x-1.safetensors"})
    write_tensors(shards / "x-1.safetensors", {"a": ("F32", [2]), "c": ("U8", [1])})
    refused(shards, "'a' is in both", str(shards / "x-1.safetensors"), str(shards / "x-2.safetensors"))


@pytest.mark.parametrize(
    "weight_map",
    [
        {"a": "x-2.safetensors", "b": "x-1.safetensors"},
        {"a": "x-1.safetensors", "b": "x-2.safetensors", "c": "x-1.safetensors"},
    ],
    ids=["swapped", "a tensor too many"],
)
def test_an_index_that_disagrees_with_the_shards(weight_map: dict[str, str], shards: Path) -> None:
    write_index(shards, weight_map)
    refused(shards, "model.safetensors.index.json", "but it is not")


def test_a_damaged_shard_is_named(shards: Path) -> None:
    file = shards / "x-2.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    refused(shards, str(file), "truncated")


# The hash of a checkpoint's content


def test_content_hash_moves_with_the_folder(shards: Path) -> None:
    before = open_checkpoint(shards).content_hash()
    moved = shards.rename(shards.parent / "moved")
    assert open_checkpoint(moved).content_hash() == before
    shutil.copytree(moved, shards.parent / "copied")  # keeps times
    assert open_checkpoint(shards.parent / "copied").content_hash() == before


def _rewrite(folder: Path, name: str, tensors: dict[str, tuple[str, list[int]]]) -> None:
    times = (folder / name).stat()
    write_tensors(folder / name, tensors)
    os.utime(folder / name, ns=(times.st_atime_ns, times.st_mtime_ns))


CHANGES: dict[str, Callable[[Path], Any]] = {
    "config": lambda folder: (folder / "config.json").write_text('{"width": 2}'),
    "header": lambda folder: _rewrite(folder, "x-2.safetensors", {"b": ("BF16", [2, 2])}),
    "size": lambda folder: _rewrite(folder, "x-1.safetensors", {"a": ("F32", [3])}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_content_hash_changes_with_content(change: Callable[[Path], Any], shards: Path) -> None:
    before = open_checkpoint(shards).content_hash()
    assert open_checkpoint(shards).content_hash() == before
    change(shards)
    assert open_checkpoint(shards).content_hash() != before


def test_content_hash_knows_header_and_size_on_their_own(tmp_path: Path) -> None:
    """A header of the same length, and a file cut short after it was opened, at the same time of day."""
    write_folder(tmp_path, {"model.safetensors": {"a": ("U8", [9])}})
    checkpoint = open_checkpoint(tmp_path)
    before = checkpoint.content_hash()
    _rewrite(tmp_path, "model.safetensors", {"b": ("U8", [9])})
    assert open_checkpoint(tmp_path).content_hash() != before
    _rewrite(tmp_path, "model.safetensors", {"a": ("U8", [9])})
    assert checkpoint.content_hash() == before
    times = a_file(tmp_path).stat()
    os.truncate(a_file(tmp_path), times.st_size - 1)
    os.utime(a_file(tmp_path), ns=(times.st_atime_ns, times.st_mtime_ns))
    assert checkpoint.content_hash() != before


def test_content_hash_of_equal_configs_is_equal(shards: Path) -> None:
    (shards / "config.json").write_text('{"a": 1, "b": [2]}')
    before = open_checkpoint(shards).content_hash()
    (shards / "config.json").write_text('{ "b": [2],\n"a": 1}')
    assert open_checkpoint(shards).content_hash() == before


def test_content_hash_of_a_file_that_is_gone(shards: Path) -> None:
    checkpoint = open_checkpoint(shards)
    (shards / "x-1.safetensors").unlink()
    with pytest.raises(LoadError, match=r"x-1\.safetensors' cannot be read"):
        checkpoint.content_hash()
