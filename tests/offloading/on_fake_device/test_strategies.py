"""What only an accelerator can show: components that take turns, a budget of resident groups, what is pinned, ties."""

import copy
import gc
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn

from qexp.config.offload import OffloadConfig
from qexp.offloading import ring
from qexp.offloading.payload import leaves, module_nbytes, sites
from tests.fake_device import counters
from tests.fake_device.counters import measure
from tests.offloading import model_zoo as zoo
from tests.offloading.on_fake_device.harness import DEVICE, GIB, compare, live_bytes, offload, on_device, problems
from tests.products import representatives


def forward(model: nn.Module) -> torch.Tensor:
    (batch,) = zoo.inputs(model, 1)
    with torch.no_grad():
        return model(batch.to(DEVICE)).cpu()


@pytest.mark.parametrize("kind", ["fp32", "torchao_int8wo"])
def test_components_take_turns(kind: str) -> None:
    expected = forward(on_device(zoo.make(kind)))
    before = live_bytes()
    models = [zoo.make(kind), zoo.make(kind)]
    handles = [offload(model, OffloadConfig("model")) for model in models]
    assert live_bytes() == before
    payload = sum(group.nbytes for group in handles[0].groups)
    for number, copies in ((0, 1), (0, 0), (1, 1), (1, 0), (0, 1)):
        with measure() as seen:
            assert torch.equal(forward(models[number]), expected)
        assert seen.h2d_copies == copies + 1  # and the input
        assert seen.races == []
        assert live_bytes() - before == payload + 256  # one of them, at an aligned place
    handles[0].remove()
    assert live_bytes() == before
    assert torch.equal(forward(models[1]), expected)


BUDGETS = {"nothing": 0.0, "a third": 0.34, "everything": 1.5}  # of the model's bytes


@pytest.mark.parametrize(
    ("kind", "budget"),
    representatives(
        product(["fp32", "bitsandbytes_int8", "quanto_int4"], BUDGETS),
        [*product(["fp32"], BUDGETS), ("bitsandbytes_int8", "everything"), ("quanto_int4", "a third")],
    ),
)
def test_resident_groups_fill_the_budget_and_travel_no_more(kind: str, budget: str) -> None:
    nbytes = round(BUDGETS[budget] * module_nbytes(zoo.make(kind)))
    config = OffloadConfig("block", "cpu", resident_gib=nbytes / GIB)
    if budget == "everything":
        model = zoo.make(kind)
        total, expected = module_nbytes(model), forward(on_device(zoo.make(kind)))
        handle = offload(model, config)
        assert torch.equal(forward(model), expected)
        assert handle.statistics()["offload/groups"] == handle.statistics()["offload/copies"] == 0
        assert handle.statistics()["offload/at_rest_device_gib"] * GIB == total
        return
    pair = compare(kind, config, None, starts_on_device=False)
    assert problems(pair, config) == []
    free = compare(kind, OffloadConfig("block", "cpu"), None, starts_on_device=False)
    assert pair.resident_bytes <= max(nbytes, free.resident_bytes)
    if nbytes:
        assert pair.resident_bytes > free.resident_bytes and pair.payload_bytes < free.payload_bytes


def test_all_weights_are_pinned_in_one_slab_or_none_are() -> None:
    for low_cpu_mem in (False, True):
        gc.collect()
        before = counters.total.pinned_bytes
        model = zoo.make("torchao_int8wo")
        handle = offload(model, OffloadConfig("leaf", "cpu", low_cpu_mem=low_cpu_mem))
        payload = sum(group.nbytes for group in handle.groups)
        assert counters.total.pinned_bytes - before == (0 if low_cpu_mem else payload + 256)
        forward(model)
        largest = max(group.nbytes for group in handle.groups)
        pinned = counters.total.pinned_bytes - before
        assert pinned == (2 * (largest + 256) if low_cpu_mem else payload + 256)
        handle.remove()
        del handle
        assert counters.total.pinned_bytes <= before


def test_memory_that_cannot_be_pinned_is_named_once(monkeypatch: pytest.MonkeyPatch, log_lines: list[str]) -> None:
    def refuse(self: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no more locked memory")

    monkeypatch.setattr(torch.Tensor, "pin_memory", refuse)
    expected = forward(on_device(zoo.make("fp32")))
    model = zoo.make("fp32")
    offload(model, OffloadConfig("leaf", "cpu"))
    assert torch.equal(forward(model), expected)
    (line,) = [line for line in log_lines if "stay pageable" in line]
    assert "no more locked memory" in line


@pytest.mark.parametrize("non_blocking", [True, False])
def test_without_a_stream_the_host_waits_only_if_asked_to(non_blocking: bool) -> None:
    model = zoo.make("fp32")
    handle = offload(model, OffloadConfig("leaf", "cpu", use_stream=False, non_blocking=non_blocking))
    (batch,) = zoo.inputs(model, 1)
    batch = batch.to(DEVICE)
    with measure() as seen, torch.no_grad():
        model(batch)
    assert seen.host_syncs == (0 if non_blocking else len(handle.groups))
    assert seen.races == []


def test_copies_into_new_slots_wait_for_kernels_of_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel launched before still uses the memory that the allocator gives to the slot."""
    make_buffer = ring.aligned_buffer

    def buffer_in_use(nbytes: int, device: torch.device, **options: Any) -> torch.Tensor:
        return make_buffer(nbytes, device, **options).fill_(0)

    monkeypatch.setattr(ring, "aligned_buffer", buffer_in_use)
    model = zoo.make("fp32")
    (batch,) = zoo.inputs(model, 1)
    batch = batch.to(DEVICE)  # the host waits for that, so it comes first
    with measure() as seen, torch.no_grad():
        offload(model, OffloadConfig("leaf", "cpu"))
        model(batch)
    assert seen.h2d_copies > 1
    assert seen.races == []


def test_an_offloaded_model_may_be_dropped_with_copies_in_flight() -> None:
    model = zoo.make("fp32")
    handle = offload(model, OffloadConfig("leaf", "cpu", prefetch_depth=4))
    with measure() as seen:
        for _ in range(2):
            forward(model)
        del model, handle
        torch.get_device_module("fake").synchronize(DEVICE)
        live_bytes()
    assert seen.races == []


class Tied(zoo.Net):
    """A parameter of the model itself, which stays, is also in a block and in the head, which travel."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[1].gate = self.scale
        self.head.bias = self.blocks[0].fc2.bias


@pytest.mark.parametrize("resident_gib", [0.0, 0.0001])
@pytest.mark.parametrize("strategy", ["leaf", "block"])
def test_ties_survive(strategy: str, resident_gib: float) -> None:
    torch.manual_seed(0)
    model = Tied().eval().requires_grad_(False)
    expected = forward(on_device(copy.deepcopy(model)))
    names = [name for name, _ in model.named_parameters()]
    handle = offload(model, OffloadConfig(strategy, "cpu", resident_gib=resident_gib))
    assert torch.equal(forward(model), expected)
    handle.remove()
    assert [name for name, _ in model.named_parameters()] == names
    devices = {
        leaf.device.type for part in model.modules() for store, key in sites(part) for leaf in leaves(store[key])
    }
    assert devices == {"cpu"}
