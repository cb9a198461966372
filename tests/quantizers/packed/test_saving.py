"""Packed weights on disk: the bytes that the format states, back bit for bit, and every damage found."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qexp.config.schema import ComponentConfig, LoaderConfig
from qexp.errors import LoadError
from qexp.loading.lifecycle import load_component
from qexp.loading.saving import save_model
from qexp.offloading.payload import leaves
from qexp.quantizers.packed.elements import ELEMENTS
from qexp.quantizers.packed.tensor import PackedTensor
from qexp.quantizers.qexp_packed import PackedConfig
from tests.backends import CPU, Stack, StackSource, backend_config, save_stack
from tests.products import representatives

FILE = "diffusion_pytorch_model.safetensors"
ONE_WORKER = LoaderConfig(workers=1)


def load(folder: Path, backend: Any) -> Any:
    source = StackSource(folder)
    return load_component(source, "stack", ComponentConfig(backend), device=CPU, loader=ONE_WORKER).model


def saved(folder: Path, shapes: list[tuple[int, int]], dtype: torch.dtype = torch.bfloat16, **fields: Any) -> Stack:
    """A packed stack that was saved to `folder`; the dense one lies beside it."""
    save_stack(folder.parent / "dense", shapes, dtype=dtype)
    model = load(folder.parent / "dense", PackedConfig(**fields))
    save_model(model, folder)
    return cast(Stack, model)


def assert_same(one: Stack, other: Stack, columns: int) -> None:
    for mine, theirs in zip(one.layers, other.layers, strict=True):
        a, b = cast(Any, mine).weight, cast(Any, theirs).weight
        assert type(a.data) is PackedTensor
        assert torch.equal(a, b)  # the format, its dtype, and every inner tensor
        assert [leaf.dtype for leaf in leaves(a)] == [leaf.dtype for leaf in leaves(b)]
    x = torch.randn(3, columns, generator=torch.Generator().manual_seed(1)).to(cast(Any, one.layers[0]).bias.dtype)
    with torch.no_grad():
        assert torch.equal(one(x), other(x))


@pytest.mark.parametrize("quant_type", representatives(ELEMENTS, list(ELEMENTS)[::4]))
def test_every_type_comes_back_bit_for_bit(quant_type: str, tmp_path: Path) -> None:
    model = saved(tmp_path / "packed", [(96, 128), (40, 96)], quant_type=quant_type, group_size=32)
    again = load(tmp_path / "packed", backend_config("none"))
    assert again.hf_quantizer.config == PackedConfig(quant_type=quant_type, group_size=32, label=quant_type)
    assert_same(model, again, 128)


@settings(derandomize=True, deadline=None, max_examples=15)
@given(
    st.sampled_from(sorted(ELEMENTS)),
    st.integers(1, 20),
    st.integers(1, 12),
    st.integers(1, 9),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_odd_shapes_and_groups_come_back(
    tmp_path_factory: pytest.TempPathFactory,
    quant_type: str,
    rows: int,
    size: int,
    groups: int,
    by_row: bool,
    dtype: torch.dtype,
) -> None:
    folder = tmp_path_factory.mktemp("odd") / "packed"
    group_size = None if by_row else size
    model = saved(folder, [(rows, size * groups)], dtype, quant_type=quant_type, group_size=group_size)
    assert_same(model, load(folder, backend_config("none")), size * groups)


def test_shards_that_part_a_weight(tmp_path: Path) -> None:
    model = saved(tmp_path / "whole", [(96, 128), (40, 96)], quant_type="uint3wo", group_size=32)
    save_model(model, tmp_path / "shards", max_shard_bytes=1000)
    index = json.loads((tmp_path / "shards" / f"{FILE}.index.json").read_text())["weight_map"]
    assert len({index[f"layers.0.weight{part}"] for part in ("", ".scale", ".offset")}) == 3
    assert_same(model, load(tmp_path / "shards", backend_config("none")), 128)


def test_the_bytes_are_those_that_the_format_states(tmp_path: Path) -> None:
    """Row 0 of a 3-bit weight, unpacked from the file by hand: 8 values to a word, the first one lowest."""
    model = saved(tmp_path / "packed", [(5, 20)], torch.float32, quant_type="uint3wo", group_size=10)
    tensors = load_file(tmp_path / "packed" / FILE)
    shapes = {name: (str(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}
    assert shapes == {
        "layers.0.bias": ("torch.float32", (5,)),
        "layers.0.weight": ("torch.uint8", (5, 3, 3)),  # ceil(20 / 8) = 3 words a row
        "layers.0.weight.scale": ("torch.bfloat16", (5, 2)),
        "layers.0.weight.offset": ("torch.bfloat16", (5, 2)),
    }
    words = [sum(int(tensors["layers.0.weight"][0, byte, j]) << 8 * byte for byte in range(3)) for j in range(3)]
    codes = [(words[place % 3] >> 3 * (place // 3)) & 7 for place in range(20)]
    scale, offset = tensors["layers.0.weight.scale"][0].float(), tensors["layers.0.weight.offset"][0].float()
    by_hand = torch.stack([scale[k // 10] * code + offset[k // 10] for k, code in enumerate(codes)])
    assert torch.equal(cast(Any, model.layers[0]).weight.dequantize()[0], by_hand)
    config = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert config == {
        "quant_method": "qexp_packed", "quant_type": "uint3wo", "group_size": 10, "modules_to_not_convert": []
    }  # fmt: skip


Tensors = dict[str, Tensor]


def without(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(name)


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: change(tensors[name]).contiguous()})


def renamed(name: str, other: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({other: tensors.pop(name)})


WEIGHT, SCALE, OFFSET = "layers.0.weight", "layers.0.weight.scale", "layers.0.weight.offset"
DAMAGES: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "no codes": (without(WEIGHT), "lacks 'layers.0.weight', a part"),
    "no scale": (without(SCALE), "lacks 'layers.0.weight.scale', a part"),
    "no offset": (without(OFFSET), "lacks 'layers.0.weight.offset', a part"),
    "nothing": (lambda tensors: [tensors.pop(name) for name in (WEIGHT, SCALE, OFFSET)], "but no quantized weight"),
    "renamed": (renamed(SCALE, SCALE + "s"), "lacks 'layers.0.weight.scale'"),
    "elsewhere": (renamed(WEIGHT, "layers.9.weight"), "a part of a packed weight; download it again"),
    "codes of another width": (changed(WEIGHT, lambda t: t[:, :3]), "is not the qdata of [96, 128] weights as uint4wo"),
    "codes in two dimensions": (changed(WEIGHT, lambda t: t.flatten(1)), "is U8 [96, 64] in"),
    "codes in another dtype": (changed(WEIGHT, lambda t: t.view(torch.int8)), "is I8 [96, 4, 16] in"),
    "fewer rows": (changed(WEIGHT, lambda t: t[:95]), "is U8 [95, 4, 16] in"),
    "scale in another dtype": (changed(SCALE, lambda t: t.float()), "'layers.0.weight.scale' is F32 [96, 2] in"),
    "scale of other groups": (changed(SCALE, lambda t: t.repeat(1, 2)), "is BF16 [96, 4] in"),
    "scale that is not a number": (changed(SCALE, lambda t: t * torch.nan), "the scale of the quantized weight of"),
    "endless offset": (changed(OFFSET, lambda t: t + torch.inf), "the offset of the quantized weight of 'layers.0'"),
    "a dense weight": (changed(WEIGHT, lambda t: torch.zeros(96, 128)), "is F32 [96, 128] in"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_part_is_found(damage: str, tmp_path: Path) -> None:
    saved(tmp_path / "packed", [(96, 128)])
    change, message = DAMAGES[damage]
    tensors = load_file(tmp_path / "packed" / FILE)
    change(tensors)
    save_file(tensors, tmp_path / "packed" / FILE, {"format": "pt"})
    with pytest.raises(LoadError, match=re.escape(message)):
        load(tmp_path / "packed", backend_config("none"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_type": "uint9wo"}, r"quant_type='uint9wo' is unknown \(did you mean"),
        ({"quant_type": "uint3wo"}, "not the qdata of .* as uint3wo"),
        ({"group_size": 32}, "not the scale of .* in groups of 32"),
        ({"group_size": 48}, "in groups of 48"),
        ({"group_size": 0}, "must be 1 or more"),
        ({"group_size": "many"}, "must be an integer, or null"),
    ],
)
def test_a_config_that_does_not_fit(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    saved(tmp_path / "packed", [(96, 128)])
    file = tmp_path / "packed" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"].update(change)
    file.write_text(json.dumps(config))
    with pytest.raises(LoadError, match=message):
        load(tmp_path / "packed", backend_config("none"))


def test_diffusers_refuses_the_method(tmp_path: Path) -> None:
    from diffusers import ConfigMixin, ModelMixin
    from diffusers.configuration_utils import register_to_config

    class Peer(ModelMixin, ConfigMixin):
        @register_to_config
        def __init__(self, width: int = 64) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(width, width)])

    saved(tmp_path / "packed", [(64, 64)], quant_type="uint8wo")
    with pytest.raises(ValueError, match="Unknown quantization type, got qexp_packed"):
        Peer.from_pretrained(tmp_path / "packed")


def test_transformers_refuses_the_shape(tmp_path: Path) -> None:
    """It goes on without the quantization: only a shape that no linear layer has keeps it from opening bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 8}
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, num_key_value_heads=2, **sizes))
    model.save_pretrained(tmp_path)
    saved(
        tmp_path / "packed", [(16, 16)], quant_type="uint8wo", group_size=16
    )  # in two dimensions: the bytes of its own shape
    packed, file = load_file(tmp_path / "packed" / FILE), tmp_path / "model.safetensors"
    tensors, name = load_file(file), "model.layers.0.mlp.up_proj"
    tensors.update({f"{name}.{part}": packed[f"layers.0.{part}"] for part in ("weight", "weight.scale")})
    save_file(tensors, file, {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    embedded = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": embedded}))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        LlamaForCausalLM.from_pretrained(tmp_path)
