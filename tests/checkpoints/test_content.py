import hashlib
import os
import shutil
from pathlib import Path

import pytest

from qexp.checkpoints import content, file_facts
from qexp.checkpoints.checkpoint import open_checkpoint, read_header
from qexp.checkpoints.content import content_digest
from qexp.errors import LoadError
from tests.loading.files import write_folder


@pytest.fixture(autouse=True)
def own_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(content, "_digests", {})
    return tmp_path / "cache"


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint's file that counts as large: three tensors, of 40,000, 100 and 900,000 bytes."""
    monkeypatch.setattr(content, "FULL_BYTES", 1000)
    monkeypatch.setattr(content, "SAMPLES_BYTES", 200_000)
    shapes = {"a": ("U8", [40_000]), "b": ("U8", [100]), "c": ("U8", [900_000])}
    return write_folder(tmp_path / "model", {"model.safetensors": shapes}) / "model.safetensors"


def digest(file: Path, **options: bool) -> str:
    return content_digest(file, header=read_header, **options)


def flip(file: Path, offset: int) -> None:
    """Change a byte of a file, and nothing else that shows: size and time stay."""
    status = file.stat()
    with file.open("r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)[0]
        stream.seek(offset)
        stream.write(bytes([byte ^ 255]))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_digest_of_small_file_is_its_sha256(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b"{}")
    assert content_digest(tmp_path / "x.json") == hashlib.sha256(b"{}").hexdigest()


@pytest.mark.parametrize("offset", [0, 500, 999])
def test_digest_of_file_with_equal_size_and_time_and_other_byte_differs(offset: int, tmp_path: Path) -> None:
    file = tmp_path / "x.bin"
    file.write_bytes(bytes(1000))
    before = content_digest(file)
    flip(file, offset)
    assert content_digest(file) != before


@pytest.mark.parametrize("tensor", ["a", "b", "c"])
@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_digest_of_large_file_sees_four_places_of_every_tensor(tensor: str, place: int, large: Path) -> None:
    entry = next(entry for entry in read_header(large).entries if entry.name == tensor)
    before = digest(large)
    flip(large, entry.offset + (entry.nbytes - 1) * place // 3)
    assert digest(large) != before


def test_digest_of_large_file_reads_as_many_bytes_as_promised(large: Path) -> None:
    entries = read_header(large).entries
    places = list(content._sample_ranges(entries))
    assert sum(nbytes for _, nbytes in places) >= 200_000
    for entry in entries:
        own = [(start, n) for start, n in places if entry.offset <= start < entry.offset + entry.nbytes]
        assert len(own) == 4 or own == [(entry.offset, entry.nbytes)]
        assert all(n >= 4096 for _, n in own) or own == [(entry.offset, entry.nbytes)]
        assert all(start + n <= entry.offset + entry.nbytes for start, n in own)


def test_full_digest_of_large_file_sees_every_byte_and_samples_do_not(large: Path) -> None:
    entry = read_header(large).entries[-1]
    starts = [start for start, _ in content._sample_ranges([entry])]
    unseen = next(
        offset for offset in range(entry.offset, starts[-1]) if not any(s <= offset < s + 4096 * 64 for s in starts)
    )
    sampled, full = digest(large), digest(large, full=True)
    flip(large, unseen)
    assert digest(large) == sampled
    assert digest(large, full=True) != full == hashlib.sha256(_flipped_back(large, unseen)).hexdigest()


def _flipped_back(file: Path, offset: int) -> bytes:
    raw = bytearray(file.read_bytes())
    raw[offset] ^= 255
    return bytes(raw)


def test_digest_of_copy_is_the_same_whatever_its_name_and_time(large: Path, tmp_path: Path) -> None:
    shutil.copyfile(large, tmp_path / "other.safetensors")
    os.utime(tmp_path / "other.safetensors", ns=(0, 1))
    assert digest(tmp_path / "other.safetensors") == digest(large)


def test_digest_of_file_in_hub_cache_is_the_one_in_its_name(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    blob = tmp_path / "blobs" / ("ab" * 32)
    blob.write_bytes(b"x")
    (tmp_path / "model.safetensors").symlink_to(blob)
    assert content_digest(tmp_path / "model.safetensors") == "ab" * 32


def test_digest_of_unchanged_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.bin"
    file.write_bytes(bytes(2 << 20))
    monkeypatch.setattr(file_facts, "FRESH_NS", 0)
    known = content_digest(file)
    monkeypatch.setattr(content.hashlib, "file_digest", lambda *_: pytest.fail("read again"))
    assert content_digest(file) == known
    content._digests.clear()  # as in another process
    assert content_digest(file) == known
    flip(file, 5)
    with pytest.raises(pytest.fail.Exception, match="read again"):
        content_digest(file)


def test_digest_of_file_written_just_now_is_not_remembered(tmp_path: Path, own_memory: Path) -> None:
    (tmp_path / "x.bin").write_bytes(bytes(2 << 20))
    content_digest(tmp_path / "x.bin")
    assert not content._digests and not own_memory.exists()


@pytest.mark.parametrize("kind", ["pipe", "folder", "missing", "device"])
def test_digest_of_no_regular_file_is_an_error_at_once(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "x"
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    elif kind == "device":
        file.symlink_to("/dev/zero")
    with pytest.raises(LoadError, match=f"'{file}'"):
        content_digest(file)


def test_content_hash_of_shards_depends_on_which_one_a_tensor_is_read_from(tmp_path: Path) -> None:
    shapes = {"a": ("F32", [2])}
    one = open_checkpoint(
        write_folder(tmp_path / "m", {"x-1.safetensors": shapes, "x-2.safetensors": {"b": ("F32", [1])}})
    )
    other = one.__class__(one.path, one.config, {**one.entries, "a": one.entries["b"]}, one.files)
    assert one.content_hash() != other.content_hash()
