"""Models that do not run their modules once each and in order, and modules that change their own weights."""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from qexp.config.offload import OffloadConfig
from qexp.offloading.strategies import Offload, apply_offload
from tests.offloading import model_zoo as zoo

LEAF = OffloadConfig("leaf", "disk")
BLOCK = OffloadConfig("block", "disk")
GIB = 2**30


def offload(model: nn.Module, store: Path, config: OffloadConfig = LEAF) -> Offload:
    return apply_offload(model, config, device=torch.device("cpu"), block_lists=["blocks"], store=store)


def pair(make: Any) -> tuple[nn.Module, nn.Module]:
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(make().eval().requires_grad_(False))
    return models[0], models[1]


class Wandering(zoo.Net):
    """Runs blocks twice, skips them, and changes their order from one forward to the next."""

    path: tuple[int, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for index in self.path:
            x = self.blocks[index](x)
        return self.head(x) * self.scale + self.shift


@pytest.mark.parametrize(
    "config", [LEAF, BLOCK, OffloadConfig("block", "disk", 2)], ids=["leaf", "block", "two_blocks"]
)
def test_blocks_called_twice_skipped_and_reordered(config: OffloadConfig, tmp_path: Path) -> None:
    resident, model = pair(Wandering)
    offload(model, tmp_path, config)
    for step, path in enumerate([(0, 1, 2), (0, 0, 2, 0), (2, 1), (), (1, 2, 1, 0)]):
        resident.path = model.path = path
        x = torch.randn(2, zoo.WIDTH, generator=torch.Generator().manual_seed(step))
        assert torch.equal(model(x), resident(x)), path


def test_each_transfer_is_counted_and_a_group_still_in_its_slot_is_not_transferred_again(tmp_path: Path) -> None:
    model = Wandering().requires_grad_(False)
    handle = offload(model, tmp_path, OffloadConfig("block", "disk", use_stream=False))
    model.path = (0, 0, 1, 0)
    model(torch.randn(2, zoo.WIDTH))
    statistics = handle.statistics()
    assert statistics["offload/copies"] == 5  # embed, 0 (twice in a row), 1, 0, head
    sizes = {group.name: group.nbytes for group in handle.groups}
    expected = sizes["embed"] + 2 * sizes["blocks.0"] + sizes["blocks.1"] + sizes["head"]
    assert statistics["offload/transferred_gib"] * GIB == expected
    assert statistics["offload/ring_gib"] * GIB == max(sizes.values())  # one slot


class Failing(zoo.Net):
    error: BaseException | None = None

    def __init__(self) -> None:
        super().__init__()
        self.blocks[1].fc1.register_forward_hook(self.fail)

    def fail(self, *_: object) -> None:
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("error", [RuntimeError("out of luck"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("config", [LEAF, BLOCK], ids=["leaf", "block"])
def test_an_exception_in_the_middle_leaves_a_usable_model(
    error: BaseException, config: OffloadConfig, tmp_path: Path
) -> None:
    resident, model = pair(Failing)
    handle = offload(model, tmp_path, config)
    batch = torch.randn(2, zoo.WIDTH)
    model.error = error
    for _ in range(2):
        with pytest.raises(type(error)):
            model(batch)
        if isinstance(error, Exception):
            assert all(binding.is_bound() for group in handle.groups for binding in group.at_rest)
    model.error = None
    assert torch.equal(model(batch), resident(batch))
    assert len(handle._engine.ring.slots) == 2  # the slot of the interrupted group was given back
    handle.remove()
    assert torch.equal(model(batch), resident(batch))


class SharedModule(zoo.Net):
    """One linear layer is used inside two blocks: it has to be on the device while they are."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[2].fc1 = self.blocks[0].fc1


class TiedParameters(zoo.Net):
    """Parameters tied within a block, between blocks, and between a block and the head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[0].norm.bias = self.blocks[0].norm.weight
        self.blocks[1].fc2.weight = self.blocks[0].fc2.weight
        self.head.bias = self.blocks[1].fc2.bias


@pytest.mark.parametrize("config", [LEAF, BLOCK], ids=["leaf", "block"])
@pytest.mark.parametrize("make", [SharedModule, TiedParameters])
def test_shared_modules_and_tied_parameters(make: Any, config: OffloadConfig, tmp_path: Path) -> None:
    resident, model = pair(make)
    names = [name for name, _ in model.named_parameters()]  # each object once
    handle = offload(model, tmp_path, config)
    for batch in (torch.randn(2, zoo.WIDTH), torch.randn(2, zoo.WIDTH)):
        assert torch.equal(model(batch), resident(batch))
    assert handle.statistics()["offload/at_rest_device_gib"] == 0
    if make is SharedModule:
        assert "blocks.0.fc1" in [group.name for group in handle.groups]
    handle.remove()
    assert [name for name, _ in model.named_parameters()] == names


def test_tied_parameters_of_one_group_are_stored_once(tmp_path: Path) -> None:
    model = nn.Sequential(nn.LayerNorm(512))
    model[0].bias = model[0].weight
    handle = offload(model, tmp_path)
    assert handle.statistics()["offload/payload_gib"] * GIB == 512 * 4


def test_layers_of_torch_that_never_call_their_children(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), nn.Linear(64, 64))

    resident, model = pair(make)
    handle = offload(model, tmp_path)
    batch = torch.randn(2, 5, 64)
    assert torch.equal(model(batch), resident(batch))
    assert handle.statistics()["offload/groups"] == 2
    assert handle.statistics()["offload/resident_gib"] == 0


class Remembering(nn.Module):
    """Its output depends on the forwards before."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("memory", torch.zeros(8))


class InPlace(Remembering):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.memory.add_(1)


class Replacing(Remembering):
    def forward(self, x: Tensor) -> Tensor:
        self.memory = self.memory + 1
        return x + self.memory


class Pointing(Remembering):
    def forward(self, x: Tensor) -> Tensor:
        self.memory.data = self.memory + 1
        return x + self.memory


@pytest.mark.parametrize("kind", [InPlace, Replacing, Pointing])
@pytest.mark.parametrize("to", ["cpu", "disk"])
def test_buffers_that_a_forward_changes_keep_their_new_values(to: str, kind: Any, tmp_path: Path) -> None:
    resident, model = pair(lambda: nn.Sequential(kind(), nn.Linear(8, 8), kind()))
    handle = offload(model, tmp_path, OffloadConfig("leaf", to))
    x = torch.randn(8)
    for _ in range(3):
        assert torch.equal(model(x), resident(x))
    handle.remove()
    assert torch.equal(model[2].memory, torch.full((8,), 3.0))
    assert torch.equal(model(x), resident(x))


@pytest.mark.parametrize("to", ["cpu", "disk"])
def test_a_bias_that_bitsandbytes_casts_to_the_input_stays_cast(to: str, tmp_path: Path) -> None:
    def make() -> nn.Module:
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        zoo.QUANTIZERS["bitsandbytes_int8"](model)
        return model

    resident, model = pair(make)
    handle = offload(model, tmp_path, OffloadConfig("leaf", to))
    for dtype in (torch.bfloat16, torch.float32, torch.float32):  # the fp32 bias loses its last bits for good
        x = torch.randn(4, 64, dtype=dtype)
        assert torch.equal(model(x), resident(x))
    handle.remove()
    assert torch.equal(model[0].bias, resident[0].bias)


@pytest.mark.parametrize("to", ["cpu", "disk"])
def test_weights_can_be_read_and_written_at_rest(to: str, tmp_path: Path) -> None:
    resident, model = pair(zoo.Net)
    other = zoo.Net().eval()
    batch = torch.randn(2, zoo.WIDTH)
    handle = offload(model, tmp_path / "store", OffloadConfig("block", to))
    model(batch)
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in resident.state_dict().items())
    safetensors.torch.save_file(state, tmp_path / "saved.safetensors")
    saved = safetensors.torch.load_file(tmp_path / "saved.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in resident.state_dict().items())
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(batch), other(batch))
    model.load_state_dict(resident.state_dict())
    handle.remove()
    assert torch.equal(model(batch), resident(batch))
    handle = offload(model, tmp_path / "store", OffloadConfig("block", to))
    model.to(torch.bfloat16)
    resident.to(torch.bfloat16)
    assert torch.equal(model(batch.bfloat16()), resident(batch.bfloat16()))
    model.to(torch.float32)
    handle.remove()
    assert torch.equal(model(batch), resident.to(torch.float32)(batch))


def test_quantized_state_dict_is_right_at_rest(tmp_path: Path) -> None:
    for kind in ("bitsandbytes_nf4_nested", "bitsandbytes_int8"):
        resident, model = zoo.make(kind), zoo.make(kind)
        handle = offload(model, tmp_path, BLOCK)
        expected, found = resident.state_dict(), model.state_dict()
        assert list(found) == list(expected)
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        handle.remove()


def test_inference_mode_and_a_module_run_alone(tmp_path: Path) -> None:
    resident, model = pair(zoo.Net)
    with torch.inference_mode():
        handle = offload(model, tmp_path, BLOCK)
        batch = torch.randn(2, zoo.WIDTH)
        for _ in range(2):
            assert torch.equal(model(batch), resident(batch))
    assert torch.equal(model.blocks[1](batch.clone()), resident.blocks[1](batch.clone()))
    handle.remove()
    assert torch.equal(model(batch.clone()), resident(batch.clone()))
