"""The store of weight files: what it promises about content, other models, full disks, exits and kills."""

import ctypes
import errno
import mmap
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from qexp.config.offload import OffloadConfig
from qexp.errors import DiskError
from qexp.offloading.disk import DiskStore, WeightFile
from qexp.offloading.strategies import apply_offload
from tests.offloading import model_zoo as zoo

LEAF = OffloadConfig("leaf", "disk")
CPU = torch.device("cpu")
LIBC = ctypes.CDLL(None, use_errno=True)


def write(store: DiskStore, name: str = "layer", seed: int = 0) -> tuple[WeightFile, Tensor]:
    """Two leaves with a gap of 56 bytes between them, and one after them."""
    content = torch.randint(1, 256, (1024,), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    content[200:256] = 0
    content[712:] = 0
    return store.write(name, 1024, [(0, content[:200]), (256, content[256:712])]), content


def read(file: WeightFile) -> Tensor:
    buffer = torch.zeros(file.nbytes, dtype=torch.uint8)
    file.read(buffer)
    return buffer


def is_cached(path: Path) -> bool:
    """Whether the page cache has the file's first page. A read would not tell: even with RWF_NOWAIT, it reads ahead.

    Raises: OSError where the system does not tell.
    """
    resident = ctypes.c_ubyte(0)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as pages:
        start = ctypes.c_char.from_buffer(pages)
        failed = LIBC.mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(1), ctypes.byref(resident))
        del start  # the mapping cannot be closed before
    if failed:
        raise OSError(ctypes.get_errno(), "mincore")
    return bool(resident.value & 1)


def test_files_hold_the_flat_memory_and_say_what_they_are(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, 1024)
    file, content = write(store)
    assert file.path.read_bytes() == content.numpy().tobytes()
    assert torch.equal(read(file), content)
    assert torch.equal(file.flat, content)
    same, _ = write(store)
    assert same.path != file.path
    assert same.path.name.split("-")[1] == file.path.name.split("-")[1]  # the same content, the same hash
    assert sorted(path.suffix for path in store.folder.iterdir()) == [".bin", ".bin", ".lock"]
    store.remove()
    assert not any(tmp_path.iterdir())


def test_two_models_in_one_place_never_mix(tmp_path: Path) -> None:
    first, second = DiskStore(tmp_path, 1024), DiskStore(tmp_path, 1024)
    (one, content), (two, other) = write(first, seed=1), write(second, seed=2)
    assert torch.equal(read(one), content) and torch.equal(read(two), other)
    first.remove()
    assert torch.equal(read(two), other)


@pytest.mark.parametrize("read_before", [False, True])
def test_a_file_that_changed_is_noticed(read_before: bool, tmp_path: Path) -> None:
    store = DiskStore(tmp_path, 1024)
    file, _ = write(store)
    if read_before:
        read(file)
    content = bytearray(file.path.read_bytes())
    content[300] ^= 1
    file.path.write_bytes(content)
    with pytest.raises(DiskError, match="no longer holds the weights of 'layer'"):
        read(file)


def test_a_file_that_is_gone_or_shorter_is_noticed(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, 1024)
    file, _ = write(store)
    os.truncate(file.path, 1000)
    with pytest.raises(DiskError, match=r"could not read the weights of 'layer' .*ends after 1000 of 1024 bytes"):
        read(file)
    file.path.unlink()
    with pytest.raises(DiskError, match=r"'layer' at .*No such file"):
        read(file)


def test_a_place_that_is_not_writable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DiskError, match=r"could not create a folder .*Not a directory; .*offload.to=cpu"):
        DiskStore(tmp_path / "file" / "store", 1)
    with pytest.raises(DiskError, match="could not create a folder"):
        DiskStore(Path("/proc/store"), 1)


def test_a_disk_without_room_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DiskError, match=r"needs 1048576.00 GiB for the weights, .* has .* GiB free"):
        DiskStore(tmp_path / "new", 2**50)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2**19))
    with pytest.raises(DiskError, match=r"needs 3.00 MiB for the weights, .* has 0.50 MiB free"):
        DiskStore(tmp_path / "new", 3 * 2**20)
    assert not any(tmp_path.iterdir())


def test_a_disk_that_fills_up_in_the_middle_gives_the_model_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = zoo.make("bitsandbytes_nf4_nested")
    (batch,) = zoo.inputs(model, 1)
    (expected,) = zoo.outputs(model, [batch])
    calls = []

    def fill_up(handle: int, offset: int, nbytes: int) -> None:
        calls.append(nbytes)
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", fill_up)
    with pytest.raises(DiskError, match=r"could not write .*No space left on device; free some space"):
        apply_offload(model, LEAF, device=CPU, block_lists=[], store=tmp_path)
    assert torch.equal(zoo.outputs(model, [batch])[0], expected)
    assert not any(tmp_path.iterdir())


def test_a_failed_read_leaves_a_usable_engine(tmp_path: Path) -> None:
    model = zoo.make("fp32")
    (batch,) = zoo.inputs(model, 1)
    (expected,) = zoo.outputs(model, [batch])
    handle = apply_offload(model, LEAF, device=CPU, block_lists=[], store=tmp_path)
    path = next(group.rest.path for group in handle.groups if group.name == "blocks.1.fc2")
    content = path.read_bytes()
    path.write_bytes(bytes(len(content)))
    before = model.blocks[1].fc1(batch)
    for _ in range(2):
        with pytest.raises(DiskError, match=r"'blocks\.1\.fc2'"):
            zoo.outputs(model, [batch])
        # fc1 was in the slot that the failed read has overwritten
        assert torch.equal(model.blocks[1].fc1(batch), before)
    path.write_bytes(content)
    assert torch.equal(zoo.outputs(model, [batch])[0], expected)


def test_the_page_cache_is_dropped_behind_reads_and_writes(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, 1024)
    file, _ = write(store)
    file.path.read_bytes()
    try:
        assert is_cached(file.path)
    except OSError:
        pytest.skip("this file system cannot tell what is cached")
    drop(file.path)
    if is_cached(file.path):
        pytest.skip("this file system keeps its files in memory")
    file.path.read_bytes()
    assert is_cached(file.path)
    read(file)
    assert not is_cached(file.path)
    assert not is_cached(write(store)[0].path)


def drop(path: Path) -> None:
    """Out of the page cache, where the file system has one; pages that are in use just now go a moment later."""
    deadline = time.monotonic() + 60
    while is_cached(path) and time.monotonic() < deadline:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        time.sleep(0.001)


OFFLOADS = """
import os, sys, torch
from pathlib import Path
from qexp.config.offload import OffloadConfig
from qexp.offloading.strategies import apply_offload
leaving = os.fork()  # two owners of a folder each, of one import
model = torch.nn.Sequential(torch.nn.Linear(64, 64))
handle = apply_offload(model, OffloadConfig("leaf", "disk"), device=torch.device("cpu"), block_lists=[],
                       store=Path(sys.argv[1]))
child = os.fork()
if child == 0:  # a child must not take the folder away
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
assert handle.groups[0].rest.path.exists()
if leaving == 0:
    sys.exit(0)
assert os.waitpid(leaving, 0)[1] == 0
print("ready", flush=True)
sys.stdin.read()
"""


def test_an_exit_cleans_up_and_a_kill_is_cleaned_up_by_the_next_store(tmp_path: Path) -> None:
    place = tmp_path / "store"
    pipe = subprocess.PIPE
    killed = subprocess.Popen([sys.executable, "-c", OFFLOADS, str(place)], stdin=pipe, stdout=pipe, text=True)
    assert killed.stdout is not None and killed.stdout.readline() == "ready\n"
    (left,) = place.iterdir()  # of the one that has not ended
    store = DiskStore(place, 1)
    assert left.exists()  # its owner lives
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert left.exists()
    other = DiskStore(place, 1)
    assert not left.exists() and store.folder.exists()
    store.remove()
    other.remove()
    assert not any(place.iterdir())


def test_without_a_stream_the_group_that_comes_next_is_announced_to_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    expect = WeightFile.expect

    def note(file: WeightFile) -> None:
        asked.append(file.name)
        expect(file)

    monkeypatch.setattr(WeightFile, "expect", note)
    model = zoo.make("fp32")
    config = OffloadConfig("block", "disk", use_stream=False)
    handle = apply_offload(model, config, device=CPU, block_lists=["blocks"], store=tmp_path)
    batches = zoo.inputs(model, 3)
    zoo.outputs(model, batches[:2])
    asked.clear()
    zoo.outputs(model, batches[2:])
    assert asked == ["blocks.0", "blocks.1", "blocks.2", "head", "embed"]  # the last one for the next step
    handle.remove()


def test_reading_ahead_brings_a_file_into_the_page_cache(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, 1024)
    file, _ = write(store)
    drop(file.path)
    if is_cached(file.path):
        pytest.skip("this file system keeps its files in memory")
    file.expect()
    deadline = time.monotonic() + 60
    while not is_cached(file.path) and time.monotonic() < deadline:
        time.sleep(0.001)
    assert is_cached(file.path)
    file.path.unlink()
    file.expect()  # what is wrong is said when it is read
    with pytest.raises(DiskError, match="read the weights of 'layer'"):
        read(file)
    store.remove()
