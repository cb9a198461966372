"""Tensors on the fake device: the CPU's results, one device for each operation, memory that is counted."""

import copy
import gc

import pytest
import torch
from torch import nn

from tests.fake_device import counters, memory
from tests.fake_device.counters import measure

ZERO, ONE = torch.device("fake", 0), torch.device("fake", 1)
MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 8)), (3, 8)),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4)), (2, 3, 8, 8)),
    "attention": (lambda: nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), (2, 5, 16)),
    "embedding": (lambda: nn.Sequential(nn.Unflatten(1, (2, 4)), nn.Flatten(), nn.BatchNorm1d(8)), (3, 8)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_models_give_the_results_of_the_cpu(name: str, dtype: torch.dtype) -> None:
    make, shape = MODELS[name]
    torch.manual_seed(0)
    on_cpu = make().eval().requires_grad_(False).to(dtype)
    on_device = copy.deepcopy(on_cpu).to(ONE)
    x = torch.randn(shape).to(dtype)
    result = on_device(x.to(ONE))
    assert result.device == ONE
    assert torch.equal(result.cpu(), on_cpu(x))


def test_numbers_sizes_and_empty_outputs() -> None:
    x = torch.arange(6, device=ONE)
    assert x.device == ONE
    assert (x * 0.5).dtype == torch.float32
    assert (torch.ones((), dtype=torch.bfloat16, device=ONE) * 2.5).dtype == torch.bfloat16  # numbers do not promote
    assert torch.equal(x[x > 2].cpu(), torch.tensor([3, 4, 5]))
    assert torch.equal(torch.add(x, 1, out=torch.empty(0, dtype=x.dtype, device=ONE)).cpu(), torch.arange(1, 7))
    assert [part.tolist() for part in x.split(4)] == [[0, 1, 2, 3], [4, 5]]


def test_views_share_their_storage_and_its_version() -> None:
    x = torch.zeros(4, 4, device=ZERO)
    views = [x[1:], x.t(), x.view(-1), x.view(torch.uint8), x.unfold(0, 2, 1), x.as_strided((2,), (1,)), x.detach()]
    assert {view.untyped_storage().data_ptr() for view in views} == {x.untyped_storage().data_ptr()}
    x[1:].fill_(1)
    assert x.sum().item() == 12
    assert views[0]._version == x._version == 1


def test_mixed_devices_raise() -> None:
    cpu, zero, one = torch.ones(4), torch.ones(4, device=ZERO), torch.ones(4, device=ONE)
    for left, right in ((cpu, zero), (zero, cpu), (zero, one)):
        with pytest.raises(RuntimeError, match="same device"):
            left + right
        with pytest.raises(RuntimeError, match="same device"):
            torch.cat([left, right])
        with pytest.raises(RuntimeError, match="same device"):
            nn.functional.layer_norm(left, (4,), right)
    assert (zero * torch.tensor(2.0)).sum().item() == 8  # a number may be on the CPU, as for every device


def test_memory_counts_until_the_last_view_is_gone() -> None:
    gc.collect()
    with measure() as seen:
        x = torch.empty(1024, dtype=torch.uint8, device=ONE)
        view = x[:1]
        temporary = torch.empty(512, dtype=torch.uint8, device=ONE)
        del temporary
        del x
    assert seen.peak_bytes[1] - seen.live_bytes[1] == 512
    before = counters.total.live_bytes[1]
    del view
    assert before - counters.total.live_bytes[1] == 1024
    assert torch.get_device_module("fake").memory_allocated(ONE) == counters.total.live_bytes[1]


def test_a_full_device_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "capacity", [1000] * counters.DEVICES)
    torch.empty(900, dtype=torch.uint8, device="fake:2")
    with pytest.raises(torch.OutOfMemoryError, match="fake:2 has 1000 bytes, 1001 more"):
        torch.empty(1001, dtype=torch.uint8, device="fake:2")
    assert torch.get_device_module("fake").mem_get_info(2) == (1000, 1000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.uint8])
def test_new_memory_is_poisoned(dtype: torch.dtype) -> None:
    values = torch.empty(4, dtype=dtype, device=ZERO).cpu().float()
    assert bool(values.isnan().all()) or set(values.tolist()) in ({-1.0}, {255.0})
