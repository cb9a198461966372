"""A quantized model cannot be cast by accident, and is moved, copied, pickled and measured whole."""

import copy
import gc
import io
import pickle
import weakref
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qexp.config.offload import OffloadConfig
from qexp.errors import ConfigError
from qexp.loading.quantized_model import Guarded
from qexp.offloading.payload import leaves
from qexp.offloading.strategies import apply_offload
from tests.backends import CPU, EVERY_WAY_TO_QUANTIZE, QUANTIZING, REPRESENTATIVES, same_bytes
from tests.loading.toys import WIDTH, Toy, answer_of, load_in_bf16, load_toy, random_state, save_state, settings
from tests.products import representatives

BF16 = torch.bfloat16
CASTS = {
    "to dtype": lambda model: model.to(torch.float16),
    "to the same dtype": lambda model: model.to(BF16),
    "to keyword": lambda model: model.to(dtype=torch.float32),
    "to device and dtype": lambda model: model.to("cpu", torch.float16),
    "to other": lambda model: model.to(torch.zeros(1)),
    "half": lambda model: model.half(),
    "float": lambda model: model.float(),
    "bfloat16": lambda model: model.bfloat16(),
    "double": lambda model: model.double(),
    "type": lambda model: model.type(torch.float16),
    "around it": lambda model: nn.Sequential(model).half(),
    "around it, up": lambda model: nn.Sequential(model).float(),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_state(tmp_path_factory.mktemp("toy"), random_state(Toy))


def all_leaves(model: nn.Module) -> list[Tensor]:
    return [leaf.clone() for parameter in model.parameters() for leaf in leaves(parameter)]


@pytest.mark.parametrize("backend", EVERY_WAY_TO_QUANTIZE)
def test_dtype_assignment(backend: str, folder: Path) -> None:
    """Every cast is refused, and has changed nothing by then; `.to(device)` is not one."""
    model = load_in_bf16(folder, backend)
    expected = answer_of(model)  # LLM.int8 hands scales from weights to layers now
    before = all_leaves(model)
    for name, cast in CASTS.items():
        with pytest.raises(ValueError, match=r"cannot be cast.*compute_dtype.*dequantize") as caught:
            cast(model)
        assert isinstance(caught.value, ConfigError), name
    assert all(same_bytes(a, b) for a, b in zip(before, all_leaves(model), strict=True))
    for moved in (model.to("cpu"), model.to(device=CPU), model.cpu(), model.to(CPU, non_blocking=True)):
        assert moved is model
        assert torch.equal(answer_of(model), expected)


@pytest.mark.parametrize(
    ("backend", "state"),
    representatives(  # a forward moves values of LLM.int8 alone to another place
        product(QUANTIZING, ["loaded", "after a forward"]),
        [("bitsandbytes_int8", "loaded"), *((name, "after a forward") for name in REPRESENTATIVES[1:])],
    ),
)
def test_copies_and_pickles_answer_the_same(backend: str, state: str, folder: Path) -> None:
    model = load_in_bf16(folder, backend)
    if state == "after a forward":
        answer_of(model)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    twins = [copy.deepcopy(model), torch.load(stream, weights_only=False)]
    if "float8" not in backend:  # torch cannot unpickle a float8 tensor that `pickle` wrote
        twins.append(pickle.loads(pickle.dumps(model)))
    expected = answer_of(model)
    for twin in twins:
        assert type(twin) is type(model) and type(twin).__name__ == "Toy"
        assert type(twin.embed.weight) is type(model.embed.weight)
        assert torch.equal(answer_of(twin), expected)
        assert not {leaf.data_ptr() for leaf in leaves(twin.embed.weight)} & {
            leaf.data_ptr() for leaf in leaves(model.embed.weight)
        }
        with pytest.raises(ConfigError):
            twin.half()
        assert type(twin.dequantize()) is Toy
    assert torch.equal(answer_of(model), expected)


def test_a_copy_keeps_tied_weights_tied(folder: Path) -> None:
    model = load_in_bf16(folder, "quanto")
    model.again = nn.ModuleDict({"embed": model.embed})
    model.head.weight = model.blocks[0].fc1.weight
    twin = copy.deepcopy(model)
    assert twin.again["embed"] is twin.embed
    assert twin.head.weight is twin.blocks[0].fc1.weight


def test_the_guard_keeps_no_model_alive(folder: Path) -> None:
    gc.collect()
    gc.disable()
    try:
        model = load_in_bf16(folder, "bitsandbytes")
        answer_of(model)
        gone = weakref.ref(model.embed.weight)
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_a_guarded_model_is_of_its_class(folder: Path) -> None:
    model = load_in_bf16(folder, "torchao")
    kind = type(model)
    assert isinstance(model, Toy) and isinstance(model, Guarded)
    assert (kind.__name__, kind.__qualname__, kind.__module__) == (Toy.__name__, Toy.__qualname__, Toy.__module__)
    assert kind is type(load_in_bf16(folder, "quanto"))
    assert type(load_in_bf16(folder, "none")) is Toy
    assert load_in_bf16(folder, "none").half().head.weight.dtype == torch.float16


def test_an_adapter_stays_the_parameter_that_its_optimizer_knows(folder: Path) -> None:
    model = load_in_bf16(folder, "bitsandbytes_int8")
    model.adapter = nn.Linear(WIDTH, 4)
    weight, quantized = model.adapter.weight, model.embed.weight
    assert model.to("cpu").adapter.weight is weight and weight.requires_grad
    assert not model.embed.weight.requires_grad
    assert type(model.embed.weight) is type(quantized)


@pytest.mark.parametrize("backend", EVERY_WAY_TO_QUANTIZE)
def test_memory_footprint(backend: str, folder: Path) -> None:
    """By hand: what the plan says of every tensor, and the buffers that no checkpoint holds."""
    loaded = load_toy(folder, settings(backend, compute_dtype="bfloat16"))
    model: Any = loaded.model
    planned = sum(item.result_nbytes for item in loaded.plan.items)
    scales = 6 * 2 * 2 if "quanto" in backend else 0  # of the activations of six layers, in and out, in bf16
    assert model.get_memory_footprint() == planned + WIDTH * 4 + scales
    buffers = 2 * WIDTH + 8 * 5 + 4 * WIDTH + scales  # shift, steps, position
    assert model.get_memory_footprint(return_buffers=False) == model.get_memory_footprint() - buffers
    model.dequantize()
    assert not hasattr(model, "get_memory_footprint")


def test_an_offloaded_model_is_not_moved_or_copied(folder: Path, tmp_path: Path) -> None:
    model = load_in_bf16(folder, "torchao")
    expected = answer_of(model)
    config = OffloadConfig("leaf", "cpu").resolved("cpu")
    offload = apply_offload(model, config, device=CPU, block_lists=[], store=tmp_path)
    for attempt in (lambda: model.to("cpu"), lambda: copy.deepcopy(model)):
        with pytest.raises(ConfigError, match=r"offloaded model cannot be (moved|copied).*remove_offload"):
            attempt()
    offload.remove()
    assert torch.equal(answer_of(copy.deepcopy(model.to("cpu"))), expected)
