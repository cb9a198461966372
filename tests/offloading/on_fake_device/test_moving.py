"""`.to(device)` takes every byte of a guarded model along, whatever the format and whether it has run, and back."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from qexp.loading.quantized_model import guard
from qexp.offloading.payload import leaves, sites
from tests.backends import REPRESENTATIVES
from tests.offloading import model_zoo as zoo
from tests.offloading.on_fake_device.test_matrix import KINDS
from tests.products import representatives

FAKE = torch.device("fake", 0)


def devices(model: nn.Module) -> set[torch.device]:
    """Where the bytes of parameters, buffers and states lie; a weight may say something else of itself."""
    return {leaf.device for part in model.modules() for store, name in sites(part) for leaf in leaves(store[name])}


def moves(model: nn.Module) -> Iterator[tuple[torch.device, nn.Module]]:
    yield FAKE, model.to(FAKE)
    yield torch.device("cpu"), model.cpu()
    yield FAKE, nn.Sequential(model).to("fake:0")[0]
    yield torch.device("cpu"), model.to(device="cpu")


@pytest.mark.parametrize("kind", representatives(KINDS, [f"conf/{name}" for name in REPRESENTATIVES]))
def test_a_model_is_moved_whole(kind: str) -> None:
    model = zoo.make(kind)
    (x,) = zoo.inputs(model, count=1)
    guard(model)
    with torch.no_grad():
        expected = model(x)
        for device, moved in moves(model):
            assert moved is model
            assert devices(model) == {device}
            answer = model(x.to(device))
            assert answer.device == device
            assert torch.equal(answer.cpu(), expected)
