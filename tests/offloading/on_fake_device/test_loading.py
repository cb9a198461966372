"""Loading straight onto an accelerator: every option of conf/backend, and the memory that a load is said to take."""

import gc

import pytest
import torch

from qexp.loading.streaming import file_reader
from qexp.offloading.payload import leaves, module_nbytes
from qexp.system.memory import PeakMemory
from tests.backends import REPRESENTATIVES
from tests.fake_device import memory
from tests.fake_device.counters import measure
from tests.offloading import model_zoo as zoo
from tests.offloading.on_fake_device.harness import DEVICE, equal, live_bytes, plain, run
from tests.products import representatives

BACKENDS = [kind.removeprefix("conf/") for kind in zoo.LOADED]
WITHOUT = {"bitsandbytes_nf4_dq"}  # the library quantizes scales on real devices only
KEPT = {*REPRESENTATIVES, "bitsandbytes", "mixed"} - WITHOUT


@pytest.mark.usefixtures("no_thread_is_left")
@pytest.mark.parametrize("backend", representatives([name for name in BACKENDS if name not in WITHOUT], KEPT))
def test_a_model_loaded_on_the_device_by_one_worker_or_several_is_the_one_loaded_on_the_cpu(backend: str) -> None:
    expected_model = zoo.load(backend, depth=2)
    batches = zoo.inputs(expected_model)
    expected = zoo.outputs(expected_model, batches)
    before = live_bytes()
    model = zoo.load(backend, depth=2, device=str(DEVICE))
    assert {leaf.device for leaf in plain(model)} == {DEVICE}
    gc.collect()
    assert live_bytes() - before - module_nbytes(model) < 512  # tables that libraries keep
    with measure() as seen:
        by_several = zoo.load(backend, depth=2, device=str(DEVICE), workers=6)
        assert equal(plain(model), plain(by_several))
        zoo.outputs(by_several, [batches[0].to(DEVICE)])
        del by_several
        gc.collect()
    assert seen.races == []
    found = run(model, batches, before).outputs
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(found, expected, strict=True))


def test_a_weight_that_reaches_the_device_in_pieces_is_the_whole_one(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = zoo.load("torchao", depth=1, device=str(DEVICE)).state_dict()
    monkeypatch.setattr(file_reader, "PIECE_BYTES", 300)  # no whole number of rows, or of a weight's bytes
    found = zoo.load("torchao", depth=1, device=str(DEVICE)).state_dict()
    for name, tensor in expected.items():
        alike = zip(leaves(found[name]), leaves(tensor), strict=True)
        assert all(torch.equal(a.cpu(), b.cpu()) for a, b in alike), name


def test_the_first_use_of_a_device_may_be_to_watch_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a load without quantization, which quantizes no weight to warm up."""
    monkeypatch.setattr(memory, "used", [False])
    with PeakMemory(DEVICE) as peak:
        before = live_bytes()
        kept = torch.ones(1000, device=DEVICE)
    assert peak.peak_device_bytes == before + kept.nbytes
