"""Every backend option of conf/, quantized on the device and offloaded by every strategy, answers as if resident."""

from pathlib import Path

import pytest
import torch

from qexp.config.offload import OffloadConfig
from qexp.offloading.strategies import apply_offload
from tests.backends import BACKENDS
from tests.fake_device.counters import measure
from tests.offloading.on_fake_device.test_placement import DEVICES, answers, batch, folder, load
from tests.products import representatives

WAYS = [
    OffloadConfig("leaf", "cpu"),
    OffloadConfig("block", "cpu", prefetch_depth=3),
    OffloadConfig("sequential", "disk"),
    OffloadConfig("model", "cpu"),
    OffloadConfig("block", "disk", num_blocks_per_group=2, use_stream=False),
    OffloadConfig("leaf", "cpu", low_cpu_mem=True, resident_gib=0.0002),
]
__all__ = ["folder"]


@pytest.mark.parametrize("backend", representatives(BACKENDS, ["quanto_int4"]))
def test_every_strategy(backend: str, folder: Path, tmp_path: Path) -> None:
    model = load(folder, backend).model
    x = batch(model).to(DEVICES[0])
    expected = answers(model, x)
    for way in WAYS:
        config = way.resolved("fake")
        with measure() as seen:
            handle = apply_offload(model, config, device=DEVICES[0], block_lists=["blocks"], store=tmp_path)
            assert handle.statistics()["offload/at_rest_device_gib"] == 0, way
            found = answers(model, x)
            handle.remove()
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), way
        assert seen.races == [], way
