"""Peak memory: short-lived allocations are seen, anonymous and mapped pages are told apart, idling costs nothing."""

import mmap
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from qexp.errors import UnsupportedError
from qexp.system import memory
from qexp.system.memory import GIB, PeakMemory, device_memory, host_memory, release_freed_memory

MIB = 1 << 20
CPU = torch.device("cpu")
pytestmark = [pytest.mark.own_process, pytest.mark.usefixtures("no_thread_is_left")]


@pytest.fixture
def no_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system on which /proc/self/clear_refs cannot be written."""
    write = Path.write_text

    def refuse(path: Path, *arguments: object, **named: object) -> int:
        if path.name == "clear_refs":
            raise PermissionError(13, "Permission denied")
        return write(path, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "write_text", refuse)


# Bounds are a MiB or two wide: the kernel counts pages thread by thread and adds them up now and then.


def allocate(mib: int, seconds: float = 0.0) -> None:
    """Fresh anonymous pages, every one touched, given back at the end."""
    with mmap.mmap(-1, mib * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as pages:
        for _ in range(mib):
            pages.write(b"\1" * MIB)
        time.sleep(seconds)


def test_what_is_resident_agrees_with_psutil() -> None:
    psutil.Process().memory_info(), host_memory()  # what either loads for its first call is there now
    ours, theirs = host_memory(), psutil.Process().memory_info()
    assert ours.total_bytes == pytest.approx(theirs.rss, abs=4 * MIB)
    assert ours.file_bytes == pytest.approx(theirs.shared, abs=4 * MIB)
    assert ours.anon_bytes + ours.file_bytes == ours.total_bytes > 50 * MIB


def test_an_allocation_freed_before_the_end_is_seen() -> None:
    with PeakMemory(CPU) as peak:
        allocate(64, 0.02)
    assert 63 * MIB <= peak.peak_bytes < 72 * MIB
    assert 62 * MIB <= peak.peak_anon_bytes < 72 * MIB
    assert peak.peak_file_bytes < 4 * MIB
    assert peak.peak_device_bytes == 0


def test_the_whole_is_exact_however_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """No sample is taken between the first and the end of the block."""
    monkeypatch.setattr(memory, "SAMPLE_SECONDS", 60)
    with PeakMemory(CPU) as peak:
        time.sleep(0.02)
        allocate(64)
    assert 63 * MIB <= peak.peak_bytes < 72 * MIB
    assert peak.peak_anon_bytes < 8 * MIB


@pytest.mark.usefixtures("no_reset")
def test_where_the_high_water_mark_cannot_be_reset_samples_stand_in() -> None:
    allocate(96)  # before the block: not its peak
    with PeakMemory(CPU) as peak:
        allocate(64, 0.05)
    assert 62 * MIB <= peak.peak_bytes < 72 * MIB


def test_earlier_peaks_do_not_count() -> None:
    allocate(96)
    with PeakMemory(CPU) as peak:
        time.sleep(0.01)
    assert peak.peak_bytes < 8 * MIB


def test_mapped_pages_are_told_from_allocated_ones(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb") as stream:
        for _ in range(32):
            stream.write(b"\1" * MIB)
    with (
        PeakMemory(CPU) as peak,
        path.open("rb") as stream,
        mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ) as pages,
    ):
        assert sum(pages[offset] for offset in range(0, len(pages), mmap.PAGESIZE)) == len(pages) // mmap.PAGESIZE
        time.sleep(0.02)
    assert 31 * MIB <= peak.peak_file_bytes < 40 * MIB
    assert peak.peak_anon_bytes < 4 * MIB
    assert 31 * MIB <= peak.peak_bytes < 40 * MIB


def test_read_pages_are_nobodys(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"\1" * (32 * MIB))
    buffer = bytearray(MIB)
    with PeakMemory(CPU) as peak, path.open("rb", buffering=0) as stream:
        while stream.readinto(buffer):
            pass
    assert peak.peak_bytes < 4 * MIB


def test_an_idle_block_costs_nothing() -> None:
    with PeakMemory(CPU) as peak:
        time.sleep(0.05)
    assert peak.peak_bytes < 2 * MIB
    assert peak.peak_anon_bytes < 2 * MIB and peak.peak_file_bytes < 2 * MIB
    assert peak.baseline.total_bytes == pytest.approx(host_memory().total_bytes, abs=4 * MIB)


def test_freeing_what_was_there_before_is_no_negative_peak() -> None:
    pages = mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for _ in range(64):
        pages.write(b"\1" * MIB)
    with PeakMemory(CPU) as peak:
        pages.close()
        time.sleep(0.01)
        allocate(32, 0.01)
    assert 0 <= peak.peak_bytes < 8 * MIB


def test_a_watcher_within_a_watcher() -> None:
    """The inner one starts the kernel's mark anew; the outer one has its samples."""
    with PeakMemory(CPU) as outer:
        allocate(64, 0.05)
        with PeakMemory(CPU) as inner:
            time.sleep(0.01)
    assert 62 * MIB <= outer.peak_bytes < 72 * MIB
    assert inner.peak_bytes < 8 * MIB


def test_an_error_in_the_block_is_passed_on_and_measured() -> None:
    with pytest.raises(ValueError, match="here"), PeakMemory(CPU) as peak:
        allocate(32, 0.01)
        raise ValueError("here")
    assert peak.peak_bytes >= 31 * MIB


def test_a_system_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bytes:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(UnsupportedError, match="run on Linux"):
        host_memory()


def test_memory_of_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its peak starts anew with the block; a CPU has none."""
    calls: list[str] = []
    device = torch.device("cuda:1")

    def module(asked: torch.device) -> SimpleNamespace:
        assert asked == device
        return SimpleNamespace(
            reset_peak_memory_stats=lambda asked: calls.append("reset"),
            max_memory_allocated=lambda asked: calls.append("peak") or 3 * GIB,
            memory_allocated=lambda asked: 2 * GIB,
        )

    monkeypatch.setattr(torch, "get_device_module", module)
    monkeypatch.setattr(torch, "empty", lambda size, device: calls.append("use"))  # CUDA is not ready before
    with PeakMemory(device) as peak:
        calls.append("work")
    assert calls == ["use", "reset", "work", "peak"]
    assert peak.peak_device_bytes == 3 * GIB
    assert device_memory(device) == 2 * GIB
    assert device_memory(CPU) == 0


def test_holes_between_what_is_kept_are_given_back() -> None:
    """Every second of 1,000 pieces of 64 KiB is freed, 31 MiB in all; the allocator alone would keep them."""
    pieces = [bytes([number % 256]) * (64 << 10) for number in range(1000)]
    del pieces[::2]
    before = host_memory().anon_bytes
    release_freed_memory()
    assert before - host_memory().anon_bytes > 20 * MIB
    assert all(piece == piece[:1] * len(piece) for piece in pieces)


def test_a_system_that_cannot_be_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: SimpleNamespace())
    release_freed_memory()
