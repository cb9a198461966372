"""Offloading to disk lowers the memory of the process: to the ring at rest, and to the ring plus activations in use."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from qexp.config.offload import OffloadConfig
from qexp.offloading.strategies import apply_offload
from qexp.system.memory import release_freed_memory

MIB = 2**20
WIDTH = 1024  # 4 MiB a layer: blocks that size stay in glibc's heap when they are freed


def resident_bytes() -> int:
    """Anonymous and file pages of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def peak_of() -> Iterator[list[int]]:
    samples = [resident_bytes()]
    done = threading.Event()

    def sample() -> None:
        while not done.is_set():
            samples.append(resident_bytes())
            time.sleep(0.001)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()


@pytest.mark.own_process
def test_resident_memory_falls_to_the_ring(tmp_path: Path) -> None:
    def make() -> nn.Sequential:
        return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(40))).requires_grad_(False)

    x = torch.randn(1, WIDTH)
    nn.Linear(WIDTH, WIDTH)(x)  # thread pools, allocator
    release_freed_memory()
    baseline = resident_bytes()
    model = make()
    expected = model(x)
    above = torch.ones(WIDTH * WIDTH)  # keeps the heap from shrinking by itself when the model below is freed
    payload = sum(parameter.nbytes for parameter in model.parameters())
    assert payload > 150 * MIB
    assert resident_bytes() - baseline > 0.95 * payload
    handle = apply_offload(
        model, OffloadConfig("leaf", "disk"), device=torch.device("cpu"), block_lists=[], store=tmp_path
    )
    assert resident_bytes() - baseline - above.nbytes < 16 * MIB  # of 160
    with peak_of() as samples:
        for _ in range(2):
            assert torch.equal(model(x), expected)
    assert len(samples) > 20
    assert max(samples) - baseline - above.nbytes < 16 * MIB
    files = [file.stat().st_size for file in tmp_path.rglob("*.bin")]
    assert (
        files == [WIDTH * WIDTH * 4 + WIDTH * 4] * 40
    )  # one a layer, of its weight and bias; both fill 256-byte steps
    handle.remove()
    assert resident_bytes() - baseline > 0.95 * payload
