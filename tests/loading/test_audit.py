"""Every way in which a load could fail in silence, made by hand in a loaded model, is found out."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from qexp.errors import LoadError
from qexp.loading.audit import audit
from qexp.quantizers.base import Quantizer, WeightSpec, load_quantizer
from tests.backends import CPU, QUANTIZING
from tests.loading.toys import WIDTH, Toy, load_toy, random_state, save_state, settings


class Loaded(NamedTuple):
    model: Any
    quantizer: Quantizer
    planned: dict[str, int]


def load(folder: Path, backend: str) -> Loaded:
    """A model that passes its audit."""
    loaded = load_toy(save_state(folder, random_state(Toy)), settings(backend, skip_modules=("head",)))
    result = Loaded(loaded.model, load_quantizer(settings(backend).backend), loaded.plan.quantized_nbytes)
    audit(*result)
    return result


def meta_parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)


def test_tensors_on_meta(tmp_path: Path) -> None:
    loaded = load(tmp_path, "torchao")
    loaded.model.head.bias = meta_parameter(10)
    loaded.model.blocks[1].norm.register_buffer("extra", torch.empty(3, device="meta"), persistent=False)
    with pytest.raises(LoadError, match=r"2 tensors have no data: 'head\.bias', 'blocks\.1\.norm\.extra'"):
        audit(*loaded)


def test_many_tensors_on_meta_are_not_all_listed(tmp_path: Path) -> None:
    loaded = load(tmp_path, "torchao")
    with pytest.raises(LoadError, match=r"tensors have no data: ('[a-z0-9.]+'(, )?){5} …$"):
        audit(loaded.model.to("meta"), *loaded[1:])


@pytest.mark.parametrize(
    ("backend", "inner"),
    [("bitsandbytes", "quant_state.absmax"), ("bitsandbytes_nf4_dq", "quant_state.state2.code"), ("torchao", "scale"),
     ("quanto_int4", "_shift")],
)  # fmt: skip
def test_inner_tensors_on_meta(backend: str, inner: str, tmp_path: Path) -> None:
    """The weight itself says that it is on the CPU."""
    loaded = load(tmp_path, backend)
    holder: Any = loaded.model.embed.weight
    *path, name = inner.split(".")
    for attribute in path:
        holder = getattr(holder, attribute)
    setattr(holder, name, getattr(holder, name).to("meta"))
    assert not loaded.model.embed.weight.is_meta
    with pytest.raises(LoadError, match=r"1 tensors have no data: 'embed\.weight'"):
        audit(*loaded)


@pytest.mark.parametrize("backend", QUANTIZING)
def test_a_layer_left_unquantized(backend: str, tmp_path: Path) -> None:
    loaded = load(tmp_path, backend)
    loaded.model.blocks[1].fc1 = nn.Linear(WIDTH, 2 * WIDTH)
    with pytest.raises(LoadError, match=r"1 layers are not quantized though planned: 'blocks\.1\.fc1'"):
        audit(*loaded)


@pytest.mark.parametrize("backend", QUANTIZING)
def test_a_dense_weight_in_a_layer_that_was_swapped(backend: str, tmp_path: Path) -> None:
    """What assigning a state dict to a skeleton on meta does: the module is there, its weight was never quantized."""
    loaded = load(tmp_path, backend)
    layer = loaded.model.embed
    layer.weight = nn.Parameter(torch.zeros(WIDTH, WIDTH), requires_grad=False)
    with pytest.raises((LoadError, AttributeError), match=r"'embed'|no attribute 'CB'"):
        audit(*loaded)


@pytest.mark.parametrize("backend", QUANTIZING)
def test_a_layer_quantized_though_it_was_to_be_skipped(backend: str, tmp_path: Path) -> None:
    loaded = load(tmp_path, backend)
    loaded.model.head = loaded.model.blocks[0].fc1
    with pytest.raises(LoadError, match=r"1 layers are quantized though not planned: 'head'"):
        audit(*loaded)


@pytest.mark.parametrize("backend", QUANTIZING)
def test_a_weight_of_other_bytes_than_planned(backend: str, tmp_path: Path) -> None:
    loaded = load(tmp_path, backend)
    wider = WeightSpec("embed", (WIDTH, 2 * WIDTH), torch.float32)
    loaded.model.embed.weight = loaded.quantizer.create_quantized_param(wider, [torch.ones(wider.shape)], {}, CPU)
    planned, found = loaded.planned["embed"], loaded.quantizer.quantized_nbytes(wider)
    assert planned != found
    with pytest.raises(LoadError, match=rf"'embed' takes {found} bytes, but {planned} were planned"):
        audit(*loaded)


@pytest.mark.parametrize("backend", QUANTIZING)
def test_nothing_quantized_at_all(backend: str) -> None:
    with pytest.raises(LoadError, match=r"quantized no layer.*backend=none"):
        audit(Toy(), load_quantizer(settings(backend).backend), {})


def test_nothing_quantized_is_right_without_a_quantizer() -> None:
    audit(Toy(), load_quantizer(settings("none").backend), {})
