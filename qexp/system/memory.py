"""How much memory this process and its device hold: what it really is, and the highest it was.

Host memory is the resident set: anonymous pages (what was allocated) plus file pages (what was mapped). The kernel
keeps the highest resident set (VmHWM), which is exact and can be reset. It does not split it, and not every system
allows the reset, so anonymous pages, file pages and their sum are also sampled every 2 ms from /proc/self/statm. Pages
the kernel caches for files that are read, not mapped, belong to no process and are not counted.

Source: man 5 proc_pid_statm, proc_pid_status, proc_pid_clear_refs.
"""

from __future__ import annotations

import ctypes
import gc
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qexp.errors import UnsupportedError
from qexp.system.memory_trace import MemoryTrace

if TYPE_CHECKING:
    import torch

MIB, GIB = 1 << 20, 1 << 30
SAMPLE_SECONDS = 0.002
PEAKS = ("peak_bytes", "peak_anon_bytes", "peak_file_bytes", "peak_device_bytes")  # of a `PeakMemory`
MADV_POPULATE_WRITE = 23  # asm-generic/mman-common.h
TAKEN_BYTES = 1 << 16  # below, a call costs what it saves
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class HostMemory:
    """Resident bytes of this process."""

    anon_bytes: int
    file_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.anon_bytes + self.file_bytes


def host_memory() -> HostMemory:
    """Return the resident memory of this process. Raises UnsupportedError where there is no /proc."""
    try:
        _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_bytes().split())
    except OSError:
        raise UnsupportedError("measuring memory needs Linux's /proc/self/statm; run on Linux") from None
    return HostMemory((resident - shared) * _PAGE_BYTES, shared * _PAGE_BYTES)


class PeakMemory:
    """Watches host and device memory inside a `with` block, over a baseline taken when it is entered.

    After the block: baseline, peak_bytes (all resident pages), peak_anon_bytes and peak_file_bytes (each over the
    baseline, each at its own moment), peak_device_bytes (allocated by torch; 0 on a CPU), and trace (all resident pages
    of the process over time, as sampled).
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stop = threading.Event()
        self.trace = MemoryTrace()
        self._anon = self._file = self._total = 0  # pages
        self.peak_bytes = self.peak_anon_bytes = self.peak_file_bytes = self.peak_device_bytes = 0

    def __enter__(self) -> PeakMemory:
        import torch

        if self._device.type != "cpu":
            torch.empty(0, device=self._device)  # CUDA has no statistics to reset before it is used
            torch.get_device_module(self._device).reset_peak_memory_stats(self._device)
        self._exact = _reset_high_water_mark()
        self.baseline = host_memory()
        self._sampler = threading.Thread(target=self._sample, name="memory-sampler", daemon=True)
        self._sampler.start()
        return self

    def _sample(self) -> None:
        started = time.perf_counter()
        with open("/proc/self/statm", "rb", buffering=0) as statm:  # opening it anew costs ten times as much as reading
            while True:
                _, resident, shared, *_ = map(int, os.pread(statm.fileno(), 200, 0).split())
                self._anon, self._file = max(self._anon, resident - shared), max(self._file, shared)
                self._total = max(self._total, resident)
                self.trace.add(time.perf_counter() - started, resident * _PAGE_BYTES)
                if self._stop.wait(SAMPLE_SECONDS):
                    return

    def __exit__(self, *_: object) -> None:
        import torch

        highest = _high_water_mark() if self._exact else 0
        self._stop.set()
        self._sampler.join()
        self.peak_anon_bytes = max(self._anon * _PAGE_BYTES - self.baseline.anon_bytes, 0)
        self.peak_file_bytes = max(self._file * _PAGE_BYTES - self.baseline.file_bytes, 0)
        # another watcher within this block may have started the kernel's anew
        highest = max(highest, self._total * _PAGE_BYTES)
        self.peak_bytes = max(highest - self.baseline.total_bytes, 0)
        if self._device.type != "cpu":
            self.peak_device_bytes = torch.get_device_module(self._device).max_memory_allocated(self._device)

    def peaks(self) -> dict[str, int]:
        """Return the peaks by their names here."""
        return {name: getattr(self, name) for name in PEAKS}

    def set_peaks(self, peaks: Mapping[str, float]) -> None:
        """Take the peaks of another block, from `peaks`."""
        for name in PEAKS:
            setattr(self, name, int(peaks[name]))


def _reset_high_water_mark() -> bool:
    """Start VmHWM anew; False where the kernel does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return False
    return True


def _high_water_mark() -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def device_memory(device: torch.device) -> int:
    """Return bytes that torch has allocated on an accelerator now; 0 on a CPU."""
    import torch

    return 0 if device.type == "cpu" else int(torch.get_device_module(device).memory_allocated(device))


def release_freed_memory() -> None:
    """Give memory that was freed back to the system, where the C library can (glibc).

    It keeps freed blocks below some 32 MiB for later. Between lasting tensors they stay as holes that no later tensor
    uses: 0.7 MiB for each weight that is quantized to 2 MiB.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def take_pages(address: int, nbytes: int) -> None:
    """Have the system give a process the pages of its memory now, all at once, before they are written.

    Page by page, as a loop reaches them, takes half as long again. Where a system does not know this (before Linux
    5.14), it is as if it had not been asked.
    """
    if nbytes >= TAKEN_BYTES:
        start = address // _PAGE_BYTES * _PAGE_BYTES
        _madvise()(ctypes.c_void_p(start), ctypes.c_size_t(address + nbytes - start), MADV_POPULATE_WRITE)


@cache
def _madvise() -> Any:
    return ctypes.CDLL(None).madvise


@contextmanager
def without_collector() -> Iterator[None]:
    """Leave garbage that refers to itself where it is for a while.

    Work that makes many objects which stay has them searched again and again: a quarter of the time of planning.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
