"""Files whose names have a prefix, or whose shapes lack dimensions of one: read as the network has them, or refused."""

import json
import re
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import qexp
from qexp.checkpoints.checkpoint import open_checkpoint
from qexp.checkpoints.gguf_header import read_gguf_header
from qexp.errors import LoadError
from qexp.loading.model_names import under_model_names
from tests.loading.gguf_files import finish
from tests.products import representatives

Q8_0 = gguf.GGMLQuantizationType.Q8_0
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."


class Net(nn.Module):
    """A tensor of each number of dimensions; rows of `narrow` are 2.5 blocks of 32."""

    def __init__(self) -> None:
        super().__init__()
        self.pad = nn.Parameter(torch.randn(1, 64))
        self.scale = nn.Parameter(torch.randn(16, 1, 1))
        self.fc = nn.Linear(64, 64)
        self.narrow = nn.Linear(80, 64)
        self.conv = nn.Conv2d(16, 16, 1)
        self.video = nn.Conv3d(4, 16, (1, 4, 4))


class Wrapped(nn.Module):
    """A network that has the names which are prefixes elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))


def network(kind: type[nn.Module] = Net) -> nn.Module:
    torch.manual_seed(0)
    return kind().requires_grad_(False)


def load(file: Path, kind: type[nn.Module] = Net, backend: str = "none") -> dict[str, Tensor]:
    (file.parent / "config.json").write_text("{}")
    loaded: Any = qexp.load(file, backend, skeleton=lambda config: kind(), device="cpu")
    return dict((loaded.dequantize() if backend != "none" or file.suffix == ".gguf" else loaded).state_dict())


def save_with_prefix(folder: Path, prefix: str, kind: type[nn.Module] = Net) -> Path:
    save_file({prefix + name: tensor for name, tensor in network(kind).state_dict().items()}, folder / "m.safetensors")
    return folder / "m.safetensors"


PREFIXES = ["module.", "_orig_mod.", "transformer.", "model.", "module._orig_mod.", "model.diffusion_model."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefix_of_all_names_is_taken_off(prefix: str, tmp_path: Path) -> None:
    found = load(save_with_prefix(tmp_path, prefix))
    for name, tensor in network().state_dict().items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("prefix", ["", "module.", "model."])
def test_prefix_that_the_network_has_is_kept(prefix: str, tmp_path: Path) -> None:
    found = load(save_with_prefix(tmp_path, prefix, Wrapped), Wrapped)
    assert torch.equal(found["model.1.weight"], network(Wrapped).state_dict()["model.1.weight"])


@pytest.mark.parametrize("bare", ["pad", "fc.weight", "video.bias"])
def test_prefix_of_some_names_is_an_error(bare: str, tmp_path: Path) -> None:
    names = network().state_dict()
    save_file({name if name == bare else f"module.{name}": t for name, t in names.items()}, tmp_path / "m.safetensors")
    with pytest.raises(LoadError, match=r"lacks .*module\..*which the model has not"):
        load(tmp_path / "m.safetensors")


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)) for _ in range(2))
        self.head = nn.Linear(64, 8)


def wrapped(name: str, segment: str) -> str:
    """As a wrapper around each block names its tensors."""
    return re.sub(r"^(blocks\.\d+)\.", rf"\1.{segment}.", name)


@pytest.mark.parametrize(
    ("segment", "prefix", "backend"),
    representatives(
        product(
            ["_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"],
            ["", "module.", "_orig_mod."],
            ["none", "gguf_q4_0"],
        ),
        [
            ("_orig_mod", "", "none"),
            ("_orig_mod", "module.", "gguf_q4_0"),
            ("module", "_orig_mod.", "none"),
            ("_fsdp_wrapped_module", "", "gguf_q4_0"),
            ("_checkpoint_wrapped_module", "module.", "none"),
        ],
    ),
)
def test_wrappers_of_parts_are_taken_out_of_names(prefix: str, segment: str, backend: str, tmp_path: Path) -> None:
    tensors = network(Deep).state_dict()
    save_file({prefix + wrapped(name, segment): t for name, t in tensors.items()}, tmp_path / "m.safetensors")
    save_file(tensors, (tmp_path / "plain").with_suffix(".safetensors"))
    found = load(tmp_path / "m.safetensors", Deep, backend)
    expected = load(tmp_path / "plain.safetensors", Deep, backend)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_wrapper_that_compiled_blocks_leave_in_a_state_dict_is_taken_out(tmp_path: Path) -> None:
    model: Any = network(Deep)
    expected = dict(model.state_dict())
    for number, block in enumerate(model.blocks):
        model.blocks[number] = torch.compile(block)
    assert any("._orig_mod." in name for name in model.state_dict())
    save_file(dict(model.state_dict()), tmp_path / "m.safetensors")
    assert torch.equal(load(tmp_path / "m.safetensors", Deep)["blocks.1.0.weight"], expected["blocks.1.0.weight"])


def test_names_that_a_network_has_itself_are_no_wrappers(tmp_path: Path) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.ModuleDict({"module": nn.Linear(64, 64)})

    save_file(network(Own).state_dict(), tmp_path / "m.safetensors")
    expected = network(Own).state_dict()["block.module.bias"]
    assert torch.equal(load(tmp_path / "m.safetensors", Own)["block.module.bias"], expected)


def test_names_that_would_become_one_stay_an_error(tmp_path: Path) -> None:
    tensors = network(Deep).state_dict()
    twice = {**tensors, "blocks.0._orig_mod.0.weight": tensors["blocks.0.0.weight"] + 1}
    save_file(twice, tmp_path / "m.safetensors")
    (tmp_path / "config.json").write_text("{}")
    under = under_model_names(object(), "model", open_checkpoint(tmp_path), network(Deep))  # type: ignore[arg-type]
    assert under.entries.keys() == twice.keys()


def test_prefix_is_taken_off_ahead_of_a_conversion(tmp_path: Path) -> None:
    class Source:
        """Renames `linear.*`, and fails, as the libraries' functions do, on other names."""

        def conversion(self, component: str, model: nn.Module, checkpoint: Any) -> Callable[[Any], dict[str, Any]]:
            return lambda tensors: {f"fc.{part}": tensors.pop(f"linear.{part}") for part in ("weight", "bias")}

    names = {name.replace("fc.", "linear."): tensor for name, tensor in network().state_dict().items()}
    save_file({f"module.{name}": tensor for name, tensor in names.items()}, tmp_path / "m.safetensors")
    (tmp_path / "config.json").write_text("{}")
    source: Any = Source()
    named = under_model_names(source, "model", open_checkpoint(tmp_path), network())
    assert named.entries.keys() == network().state_dict().keys()


def write_gguf_file(folder: Path, stored: dict[str, np.ndarray], metadata: dict[str, Any]) -> Path:
    """Net's tensors; float32 in the shapes of `stored`, those with metadata in blocks of Q8_0."""
    writer = gguf.GGUFWriter(folder / "m.gguf", "test")
    for name, tensor in network().state_dict().items():
        value = stored.get(name, tensor.numpy())
        if ORIGINAL_SHAPE + name in metadata:
            writer.add_tensor(name, gguf.quantize(value, Q8_0), raw_dtype=Q8_0)
            writer.add_array(ORIGINAL_SHAPE + name, metadata[ORIGINAL_SHAPE + name])
        elif name == "fc.weight":
            writer.add_tensor(name, gguf.quantize(value, Q8_0), raw_dtype=Q8_0)
        elif value.ndim <= 4:
            writer.add_tensor(name, value)
    return finish(writer, folder / "m.gguf")


def in_blocks(name: str) -> tuple[np.ndarray, np.ndarray]:
    """(a tensor as rows of 256, its values after Q8_0 in its own shape, by gguf-py)."""
    value = network().state_dict()[name].numpy()
    rows = value.reshape(-1, 256)
    return rows, gguf.dequantize(gguf.quantize(rows, Q8_0), Q8_0).reshape(value.shape)


@pytest.mark.parametrize("name", ["fc.weight", "narrow.weight", "conv.weight", "video.weight"])
def test_reshaped_gguf_tensor_gets_the_shape_of_its_metadata(name: str, tmp_path: Path) -> None:
    stored, metadata = {}, {}
    for one in {name, "video.weight"}:  # GGUF has at most four dimensions
        stored[one] = in_blocks(one)[0]
        metadata[ORIGINAL_SHAPE + one] = [int(size) for size in network().state_dict()[one].shape]
    found = load(write_gguf_file(tmp_path, stored, metadata))
    np.testing.assert_array_equal(found[name].numpy(), in_blocks(name)[1])


@pytest.mark.parametrize(
    ("name", "shape"), [("pad", (64,)), ("scale", (16,)), ("conv.weight", (16, 16)), ("conv.weight", (16, 16, 1))]
)
def test_gguf_tensor_without_dimensions_of_one_gets_those_of_the_network(
    name: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    original = network().state_dict()[name].numpy()
    video = [16, 4, 1, 4, 4]
    stored = {name: original.reshape(shape), "video.weight": in_blocks("video.weight")[0]}
    found = load(write_gguf_file(tmp_path, stored, {ORIGINAL_SHAPE + "video.weight": video}))
    np.testing.assert_array_equal(found[name].numpy(), original)


@pytest.mark.parametrize("shape", [(8, 2), (2, 8), (4, 4)])
def test_gguf_tensor_of_another_shape_is_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    stored = {"scale": np.ones(shape, np.float32), "video.weight": in_blocks("video.weight")[0]}
    file = write_gguf_file(tmp_path, stored, {ORIGINAL_SHAPE + "video.weight": [16, 4, 1, 4, 4]})
    with pytest.raises(LoadError, match=r"'scale' has shape .* but the model expects \[16, 1, 1\]"):
        load(file)


@pytest.mark.parametrize("shape", [[64, 63], [-64, -64], [64.0, 64.0], [4096, 1, 2]])
def test_metadata_that_is_no_shape_of_the_tensor_is_refused(shape: list[Any], tmp_path: Path) -> None:
    file = write_gguf_file(tmp_path, {"fc.weight": in_blocks("fc.weight")[0]}, {ORIGINAL_SHAPE + "fc.weight": shape})
    with pytest.raises(LoadError, match=r"m\.gguf' is damaged: 'comfy\.gguf.*4096 values; download it again"):
        read_gguf_header(file)


def test_no_shape_in_metadata_leaves_the_files_own(tmp_path: Path) -> None:
    entries = {entry.name: entry for entry in read_gguf_header(write_gguf_file(tmp_path, {}, {})).entries}
    assert entries["scale"].shape == (16, 1, 1)
    assert json.dumps(entries["fc.weight"].shape) == "[64, 64]"
