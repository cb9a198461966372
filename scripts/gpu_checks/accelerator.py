"""Memory, time and facts of the device under test, through the same calls on every kind of device; a CPU has 0 bytes.

Memory is what this process has asked PyTorch's allocator for, whatever others do on the device. (CUDA's hands out
blocks that may be up to a MiB larger; `memory_allocated` counts those, `requested_bytes` does not.)
"""

from __future__ import annotations

import gc
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

MIB = 1 << 20
WAITED = "called a synchronizing"  # what torch.cuda warns of in its synchronization debug mode


class Accelerator:
    def __init__(self, name: str) -> None:
        self.device = torch.empty(0, device=name).device  # with its index; a GPU is ready from now on
        self.module: Any = None if self.device.type == "cpu" else torch.get_device_module(self.device)

    @property
    def has_streams(self) -> bool:
        return self.module is not None and hasattr(self.module, "Stream")

    def synchronize(self) -> None:
        if self.module is not None:
            self.module.synchronize(self.device)

    def settle(self) -> None:
        """Finish all work, and free what nobody holds."""
        self.synchronize()
        gc.collect()
        if hasattr(self.module, "empty_cache"):
            self.module.empty_cache()

    def allocated_bytes(self) -> int:
        return self._bytes("current", "memory_allocated") if self.module is not None else 0

    def _bytes(self, kind: str, fallback: str) -> int:
        """Return bytes that were asked for; on a device whose allocator does not tell, bytes that it has handed out."""
        statistics = self.module.memory_stats(self.device) if hasattr(self.module, "memory_stats") else {}
        return int(statistics.get(f"requested_bytes.all.{kind}") or getattr(self.module, fallback)(self.device))

    @contextmanager
    def peak(self) -> Iterator[Callable[[], int]]:
        """Watch a block: the value, called at its end, is the most bytes that were allocated at a time."""
        if self.module is None:
            yield lambda: 0
            return
        self.synchronize()
        self.module.reset_peak_memory_stats(self.device)
        yield lambda: self._bytes("peak", "max_memory_allocated")

    @contextmanager
    def host_waits(self) -> Iterator[list[str]]:
        """The operations in a block for which the host waited; what PyTorch notices of them, which is not all."""
        found: list[str] = []
        set_mode = getattr(self.module, "set_sync_debug_mode", None)
        if set_mode is None:
            yield found
            return
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            set_mode("warn")
            try:
                yield found
            finally:
                set_mode("default")
                found += [str(warning.message) for warning in caught if WAITED in str(warning.message)]

    def works(self) -> bool:
        """Return whether it still computes: after an illegal access a GPU answers this process no more."""
        try:
            return float((torch.ones(8, device=self.device) + 1).sum()) == 16
        except Exception:  # whatever it is, the device is of no use
            return False

    def copy_bytes_per_second(self, nbytes: int, repeats: int = 4) -> tuple[float, bool]:
        """(bandwidth from the host to the device, whether from pinned memory): the median of five measurements."""
        source, pinned = torch.ones(nbytes, dtype=torch.uint8), self.module is not None
        if pinned:
            source = source.pin_memory()
        target = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        target.copy_(source, non_blocking=True)
        rates = []
        for _ in range(5):
            self.synchronize()
            started = time.perf_counter()
            for _ in range(repeats):
                target.copy_(source, non_blocking=True)
            self.synchronize()
            rates.append(repeats * nbytes / (time.perf_counter() - started))
        return sorted(rates)[2], pinned

    def facts(self) -> dict[str, Any]:
        found: dict[str, Any] = {"device": str(self.device)}
        if self.device.type == "cuda":
            properties = torch.cuda.get_device_properties(self.device)
            major, minor = torch.cuda.get_device_capability(self.device)
            found |= {
                "name": torch.cuda.get_device_name(self.device),
                "compute_capability": f"{major}.{minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "multiprocessors": properties.multi_processor_count,
                "cuda": torch.version.cuda,
                "driver": _driver_version(),
            }
        return found


def _driver_version() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.split()
    return lines[0] if lines else None
