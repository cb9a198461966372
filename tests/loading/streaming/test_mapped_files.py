"""Parts of files as tensors without a copy: the same bytes, never written to, gone with the last tensor."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qexp.checkpoints.checkpoint import open_checkpoint
from qexp.checkpoints.dtypes import TORCH_DTYPES
from qexp.checkpoints.safetensors_file import write_safetensors
from qexp.errors import LoadError
from qexp.loading.streaming import mapped_files
from qexp.loading.streaming.mapped_files import MappedFiles, can_map
from qexp.loading.streaming.stream import stream
from qexp.loading.work_item import WorkItem

pytestmark = pytest.mark.usefixtures("no_thread_is_left")


def save(file: Path, *sizes: int) -> tuple[dict[str, Tensor], list[WorkItem]]:
    """Tensors of bytes in a file, and items that map them."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"t{number:03}": torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
        for number, size in enumerate(sizes)
    }
    write_safetensors(file, tensors, {})
    entries = open_checkpoint(file).entries.values()
    return tensors, [
        WorkItem(entry.name, entry, TORCH_DTYPES[entry.dtype], entry.nbytes, read="mapped") for entry in entries
    ]


def keep(item: WorkItem, tensor: Tensor) -> Tensor:
    return tensor


def run(items: list[WorkItem]) -> dict[str, Tensor]:
    return {item.target: tensor for item, tensor in stream(items, keep, workers=2, in_flight_bytes=1 << 20)}


def mapped_bytes(file: Path) -> int:
    """Bytes of this process's address space that are mapped from a file."""
    ranges = [line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(file))]
    return sum(int(stop, 16) - int(start, 16) for start, stop in (one.split("-") for one in ranges))


def test_tensors_are_those_of_the_file_and_are_mapped(tmp_path: Path) -> None:
    tensors, items = save(tmp_path / "m.safetensors", 64, 64 * 1000, 4096, 77)
    found = run(items)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert mapped_bytes(tmp_path / "m.safetensors") >= 64 * 1001 + 4096
    assert all(found[name].data_ptr() % 64 == 0 for name in tensors)
    del found
    assert mapped_bytes(tmp_path / "m.safetensors") == 0


def test_what_is_not_aligned_is_copied(tmp_path: Path) -> None:
    tensors, items = save(tmp_path / "m.safetensors", 63, 77, 64)  # in the file: 64 bytes, then 63, then 77
    assert [item.source.offset % 64 for item in items] == [0, 0, 63]
    assert [len(item.mapped) for item in items] == [1, 1, 0]
    found = run(items)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_many_tensors_share_a_mapping_and_a_part_of_them_keeps_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, page = tmp_path / "m.safetensors", os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setattr(mapped_files, "TOGETHER_BYTES", 4 * page)
    _, items = save(file, *[page] * 64)
    found = run(items)
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(file))]
    assert len(lines) <= 16
    last = found["t063"].clone()
    found = {"t063": found["t063"]}
    assert mapped_bytes(file) <= 5 * page and torch.equal(found["t063"], last)


def test_what_is_written_to_a_tensor_never_reaches_the_file(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    _, items = save(file, 4096, 8192)
    content = file.read_bytes()
    found = run(items)
    for tensor in found.values():
        tensor.add_(1)
    again = run(items)
    assert file.read_bytes() == content
    assert all(torch.equal(found[name], again[name] + 1) for name in found)


def test_a_file_changed_while_others_are_loaded_is_an_error_at_the_end(tmp_path: Path) -> None:
    _, items = save(tmp_path / "m.safetensors", 64, 128)

    def touch(item: WorkItem, tensor: Tensor) -> Tensor:
        os.utime(item.source.file)
        return tensor

    with pytest.raises(LoadError, match=r"m\.safetensors' was changed since its header was read; load it again"):
        list(stream(items, touch, workers=1, in_flight_bytes=1))


@pytest.mark.parametrize("change", ["truncated", "replaced", "gone"])
def test_a_file_changed_after_planning_is_an_error_before_it_is_used(change: str, tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    _, items = save(file, 64 * 1000)
    if change == "truncated":
        os.truncate(file, 200)
    elif change == "replaced":
        save(tmp_path / "other", 64 * 1000)
        os.replace(tmp_path / "other", file)
    else:
        file.unlink()
    message = "cannot be mapped: No such file" if change == "gone" else "was changed since its header was read"
    with pytest.raises(LoadError, match=message):
        run(items)


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A file system that does not map files: it answers as one in user space may."""

    class Libc:
        def mmap(self, *_: object) -> int | None:
            import ctypes

            ctypes.set_errno(19)
            return mapped_files.MAP_FAILED

    monkeypatch.setattr(mapped_files, "_libc", lambda: Libc())
    yield


@pytest.mark.usefixtures("refused")
def test_a_file_system_that_maps_nothing_is_noticed(tmp_path: Path) -> None:
    _, items = save(tmp_path / "m.safetensors", 64)
    assert not can_map(tmp_path / "m.safetensors")
    with pytest.raises(LoadError, match=r"cannot be mapped: No such device; set loader\.map=false"):
        MappedFiles([items[0].source]).read(items[0].source)


def test_a_file_truncated_while_it_is_mapped_ends_the_process_with_sigbus(tmp_path: Path) -> None:
    """What the documents say of it; nothing in the process can prevent it."""
    code = """
import os, sys
from pathlib import Path
from tests.loading.streaming.test_mapped_files import run, save
file = Path(sys.argv[1])
found = run(save(file, 1 << 20)[1])
os.truncate(file, 4096)
print("still here", flush=True)
found["t000"].sum()
print("not reached")
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "m")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (-signal.SIGBUS, "still here\n"), done.stderr
