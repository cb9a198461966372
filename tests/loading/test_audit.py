"""Every way in which a load could fail in silence, made by hand in a loaded model, is found out."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from qexp.errors import LoadError
from qexp.loading.audit import audit
from qexp.loading.saving import save_model
from qexp.quantizers.base import Quantizer, load_quantizer
from qexp.quantizers.rows import WeightSpec
from tests.backends import CPU, EVERY_WAY_TO_QUANTIZE, QUANTIZING, REPRESENTATIVES
from tests.loading.toys import WIDTH, Toy, load_toy, random_state, save_state, settings
from tests.products import representatives


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


@pytest.mark.parametrize("backend", EVERY_WAY_TO_QUANTIZE)
def test_a_layer_left_unquantized(backend: str, tmp_path: Path) -> None:
    loaded = load(tmp_path, backend)
    loaded.model.blocks[1].fc1 = nn.Linear(WIDTH, 2 * WIDTH)
    with pytest.raises(LoadError, match=r"1 layers are not quantized though planned: 'blocks\.1\.fc1'"):
        audit(*loaded)


@pytest.mark.parametrize("backend", EVERY_WAY_TO_QUANTIZE)
def test_a_dense_weight_in_a_layer_that_was_swapped(backend: str, tmp_path: Path) -> None:
    """What assigning a state dict to a skeleton on meta does: the module is there, its weight was never quantized."""
    loaded = load(tmp_path, backend)
    layer = loaded.model.embed
    layer.weight = nn.Parameter(torch.zeros(WIDTH, WIDTH), requires_grad=False)
    with pytest.raises((LoadError, AttributeError), match=r"'embed'|no attribute 'CB'"):
        audit(*loaded)


@pytest.mark.parametrize("backend", representatives(QUANTIZING, ["bitsandbytes_int8", "torchao"]))
def test_a_layer_quantized_though_it_was_to_be_skipped(backend: str, tmp_path: Path) -> None:
    loaded = load(tmp_path, backend)
    loaded.model.head = loaded.model.blocks[0].fc1
    with pytest.raises(LoadError, match=r"1 layers are quantized though not planned: 'head'"):
        audit(*loaded)


@pytest.mark.parametrize("backend", EVERY_WAY_TO_QUANTIZE)
def test_a_weight_of_other_bytes_than_planned(backend: str, tmp_path: Path) -> None:
    loaded = load(tmp_path, backend)
    wider = WeightSpec("embed", (WIDTH, 2 * WIDTH), torch.float32)
    loaded.model.embed.weight = loaded.quantizer.create_quantized_param(wider, [torch.ones(wider.shape)], {}, CPU)
    planned, found = loaded.planned["embed"], loaded.quantizer.quantized_nbytes(wider)
    assert planned != found
    with pytest.raises(LoadError, match=rf"'embed' takes {found} bytes, but {planned} were planned"):
        audit(*loaded)


@pytest.mark.parametrize("backend", EVERY_WAY_TO_QUANTIZE)
def test_nothing_quantized_at_all(backend: str) -> None:
    with pytest.raises(LoadError, match=r"quantized no layer.*backend=none"):
        audit(Toy(), load_quantizer(settings(backend).backend), {})


def test_nothing_quantized_is_right_without_a_quantizer() -> None:
    audit(Toy(), load_quantizer(settings("none").backend), {})


# What libraries do without a word (of diffusers, bitsandbytes, torchao, quanto), each under what it does there


@pytest.mark.parametrize("backend", representatives(QUANTIZING, ["bitsandbytes_int8", "torchao"]))
def test_zero_layers_quantized_as_torchao_does_with_a_device_map(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers leaves every weight dense for device_map=cpu and from a single file, and says is_quantized=True."""
    kind = type(load_quantizer(settings(backend).backend))
    monkeypatch.setattr(
        kind, "create_quantized_param", lambda self, spec, sources, *_: nn.Parameter(sources[0][:].clone())
    )
    with pytest.raises((LoadError, AttributeError), match=r"not quantized though planned|no attribute 'CB'"):
        load_toy(save_state(tmp_path, random_state(Toy)), settings(backend))


@pytest.mark.parametrize("backend", ["bitsandbytes", "bitsandbytes_fp4", "bitsandbytes_nf4_dq"])
def test_a_quant_state_lost_by_detach(backend: str, tmp_path: Path) -> None:
    """What `.detach()`, `.clone()` and `.data` of a 4-bit weight leave behind."""
    loaded = load(tmp_path, backend)
    loaded.model.embed.weight = nn.Parameter(loaded.model.embed.weight.data, requires_grad=False)
    with pytest.raises(LoadError, match=r"1 layers are not quantized though planned: 'embed'"):
        audit(*loaded)


def test_a_state_dict_assigned_to_a_skeleton(tmp_path: Path) -> None:
    """`load_state_dict(assign=True)` into a Linear4bit on meta: it runs, and was never quantized."""
    loaded = load(tmp_path, "bitsandbytes")
    layer = loaded.model.blocks[0].fc1
    kind = type(layer)
    fresh = kind(layer.in_features, layer.out_features, device="meta")
    fresh.load_state_dict({"weight": torch.zeros(2 * WIDTH, WIDTH), "bias": torch.zeros(2 * WIDTH)}, assign=True)
    loaded.model.blocks[0].fc1 = fresh
    with pytest.raises(LoadError, match=r"1 layers are not quantized though planned: 'blocks\.0\.fc1'"):
        audit(*loaded)


STORED = ["bitsandbytes", "bitsandbytes_nf4_dq", "bitsandbytes_int8", "torchao", "torchao_float8wo", "quanto",
          "quanto_int4", "packed_uint4"]  # fmt: skip

APART = [name for name in STORED if name in REPRESENTATIVES]


def stored(folder: Path, backend: str) -> dict[str, torch.Tensor]:
    save_model(load(folder / "dense", backend).model, folder / "stored")
    return load_file(folder / "stored" / "diffusion_pytorch_model.safetensors")


def damage(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    path = folder / "stored" / "diffusion_pytorch_model.safetensors"
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    save_file(tensors, path, metadata)
    return folder / "stored"


@pytest.mark.parametrize("backend", representatives(STORED, APART))
def test_a_part_of_a_stored_weight_that_is_missing(backend: str, tmp_path: Path) -> None:
    """diffusers leaves a torchao weight without its scale on meta; quanto's `requantize` passes it over."""
    tensors = stored(tmp_path, backend)
    parts = [name for name in tensors if name.startswith(("embed.weight", "embed._weight", "embed.SCB"))]
    assert len(parts) > 1
    for part in parts:
        if part.endswith("weight_format"):
            continue
        kept = {name: tensor for name, tensor in tensors.items() if name != part}
        with pytest.raises(LoadError, match="embed"):
            load_toy(damage(tmp_path, kept), settings("none"))


@pytest.mark.parametrize("backend", representatives(STORED, ["bitsandbytes", "torchao"]))
def test_a_plain_key_that_is_missing(backend: str, tmp_path: Path) -> None:
    """diffusers leaves it on meta."""
    tensors = stored(tmp_path, backend)
    for name in ("head.weight", "blocks.1.norm.bias", "embed.bias", "shift"):
        kept = {key: tensor for key, tensor in tensors.items() if key != name}
        with pytest.raises(LoadError, match=f"lacks '{name}'"):
            load_toy(damage(tmp_path, kept), settings("none"))


@pytest.mark.parametrize("backend", representatives(STORED, APART))
def test_a_stored_scale_that_is_not_finite(backend: str, tmp_path: Path) -> None:
    """Every other tensor is checked for that while it is read; the parts of a stored weight are opaque there."""
    tensors = stored(tmp_path, backend)
    scales = [
        name
        for name, tensor in tensors.items()
        if name.startswith(("blocks.0.fc1.weight", "blocks.0.fc1._weight", "blocks.0.fc1.SCB"))
        and tensor.is_floating_point() and not name.endswith("quant_map")
    ]  # fmt: skip
    assert scales
    for name in scales:
        bad = {key: tensor.clone() for key, tensor in tensors.items()}
        bad[name].view(-1)[-1] = float("nan")
        with pytest.raises(LoadError, match=r"'blocks\.0\.fc1.*not finite"):
            load_toy(damage(tmp_path, bad), settings("none"))


@pytest.mark.parametrize("backend", representatives(QUANTIZING, ["bitsandbytes_int8", "torchao"]))
def test_a_model_that_is_itself_a_linear_layer(backend: str, tmp_path: Path) -> None:
    """quanto leaves it dense."""
    state = {"weight": torch.randn(WIDTH, WIDTH), "bias": torch.randn(WIDTH)}
    with pytest.raises(LoadError, match="the model itself is a linear layer"):
        load_toy(save_state(tmp_path, state), settings(backend), lambda: nn.Linear(WIDTH, WIDTH))
