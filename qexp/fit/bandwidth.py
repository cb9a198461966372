"""How fast weights travel to the device: from CPU memory to an accelerator, from the disk where the CPU computes."""

from __future__ import annotations

import os
import time
from tempfile import TemporaryFile

MEASURED_BYTES = 256 << 20


def measured_bandwidth(device: str) -> float:
    """Return bytes a second, the median of five copies of 256 MiB; of a disk, past the page cache where that can be."""
    return _from_disk() if device == "cpu" else _to_accelerator(device)


def _to_accelerator(device: str) -> float:
    import torch

    place = torch.device(device)
    source = torch.empty(MEASURED_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=place)
    module = torch.get_device_module(place)
    seconds = []
    for _ in range(6):
        module.synchronize(place)
        started = time.perf_counter()
        target.copy_(source, non_blocking=True)
        module.synchronize(place)
        seconds.append(time.perf_counter() - started)
    return MEASURED_BYTES / sorted(seconds[1:])[2]  # the first one warms up


def _from_disk() -> float:
    with TemporaryFile(dir=".") as file:
        file.write(os.urandom(1 << 20) * (MEASURED_BYTES >> 20))
        file.flush()
        os.fsync(file.fileno())
        seconds = []
        for _ in range(5):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            started = time.perf_counter()
            while file.read(1 << 22):
                pass
            seconds.append(time.perf_counter() - started)
    return MEASURED_BYTES / sorted(seconds)[2]
