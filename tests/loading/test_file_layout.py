"""save.layout=file: a GGUF file with the names and groups of the file that a model was loaded from."""

from pathlib import Path
from typing import Any, cast

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import qexp
from qexp.config.schema import ComponentConfig
from qexp.errors import ConfigError
from qexp.experiments.run import run_experiment
from qexp.loading.file_layout import FileTensor, InFileLayout, Part, check_file_layouts, read_layout
from qexp.loading.lifecycle import request_load
from qexp.loading.prepare import load_quantizer_of, prepare
from qexp.models.folder import FolderSource
from tests.assigning import run_config
from tests.backends import CPU
from tests.loading.test_gguf_interchange import (
    SD3,
    TRUE_FLUX,
    answer,
    assert_same_weights,
    flux,
    flux_original_shapes,
    load_theirs,
    sd3_original,
    sparse_gguf,
)
from tests.loading.test_gguf_loading import write
from tests.loading.test_mixed_files import mixed
from tests.loading.toys import settings

__all__ = ["flux"]  # a fixture


RULES: list[dict[str, Any]] = [
    {"modules": ["**.to_q", "**.to_k", "**.to_v"], "backend": "gguf_q5_0"},
    {"modules": ["proj_out", "norm_out.linear"], "backend": "none"},
    {"modules": "transformer_blocks.1", "backend": "gguf"},
    {"backend": "gguf_q4_0"},
]


@pytest.fixture(scope="module")
def authors_sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SD3 in bf16 as its authors' file has it, with another model's tensor beside it."""
    from diffusers import SD3Transformer2DModel

    folder = tmp_path_factory.mktemp("authors")
    with torch.device("meta"):
        SD3Transformer2DModel(**cast(Any, SD3)).save_config(folder)
    random = torch.Generator().manual_seed(0)
    original = sd3_original("Q8_0").items()
    shapes = {
        name: (len(data), data.shape[1] // 34 * 32) if kind == "Q8_0" else data.shape for name, (kind, data) in original
    }
    tensors = {name: (0.05 * torch.randn(shape, generator=random)).bfloat16() for name, shape in shapes.items()}
    save_file({**tensors, "first_stage_model.decoder.bias": torch.ones(4)}, folder / "sd3.safetensors")
    return folder / "sd3.safetensors"


def prepared(path: Path, backend: Any) -> Any:
    request = request_load(FolderSource(path, None), "model", ComponentConfig(backend), device=CPU)
    return prepare(request, load_quantizer_of(request))


def tensors_of(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def test_model_is_saved_under_its_authors_names_in_a_format_for_each_tensor(authors_sd3: Path, tmp_path: Path) -> None:
    """Rows of q, k and v are one tensor again, in their type; shift and scale are in the file's order."""
    from diffusers import SD3Transformer2DModel

    ours: Any = qexp.load(authors_sd3, mixed(*RULES), device="cpu")
    qexp.save(ours, tmp_path, layout="file")
    found, dense = tensors_of(tmp_path / "model.gguf"), load_file(authors_sd3)
    assert found.keys() == dense.keys() - {"first_stage_model.decoder.bias"}
    for name, tensor in found.items():
        assert tuple(reversed([int(size) for size in tensor.shape])) == dense[name].shape, name
        decoded = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type)).view(dense[name].shape)
        assert (decoded - dense[name]).norm() < 0.1 * dense[name].norm(), name
    types = [found[f"{name}.weight"].tensor_type.name for name in (
        "joint_blocks.1.x_block.attn.qkv", "joint_blocks.1.x_block.mlp.fc1", "joint_blocks.0.x_block.mlp.fc1",
        "final_layer.linear", "final_layer.adaLN_modulation.1",
    )]  # fmt: skip
    assert types == ["Q5_0", "Q8_0", "Q4_0", "F32", "F32"]
    field = gguf.GGUFReader(tmp_path / "model.gguf").fields["general.architecture"]
    assert field.contents() == "sd3"  # by which ComfyUI-GGUF knows it
    theirs = load_theirs(SD3Transformer2DModel, tmp_path / "model.gguf", tmp_path, torch.bfloat16)
    assert_same_weights(ours, theirs)
    again: Any = qexp.load(tmp_path, device="cpu")
    assert torch.equal(answer(again), answer(ours))


def test_flux_at_its_true_width_has_its_authors_layout_again(tmp_path: Path) -> None:
    """Without its weights: q, k, v and a part of the network's feed-forward layer are one tensor of the file."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        FluxTransformer2DModel(**cast(Any, TRUE_FLUX)).save_config(tmp_path)
    shapes = flux_original_shapes()
    found = prepared(sparse_gguf(tmp_path / "x.gguf", shapes), settings("none").backend)
    layout = read_layout(found.request.checkpoint, found.named)
    assert {name: one.shape for name, one in layout.items()} == shapes
    assert all(one.is_whole for one in layout.values())
    parts = [(part.name, part.start, part.stop) for part in layout["single_blocks.0.linear1.weight"].parts]
    block, size = "single_transformer_blocks.0", 3072 * 3072
    names = [f"{block}.attn.to_q", f"{block}.attn.to_k", f"{block}.attn.to_v", f"{block}.proj_mlp"]
    assert parts == [(f"{name}.weight", 0, size * (1 if "to_" in name else 4)) for name in names]
    halves = [(part.name, part.start) for part in layout["final_layer.adaLN_modulation.1.weight"].parts]
    assert halves == [("norm_out.linear.weight", size), ("norm_out.linear.weight", 0)]


def test_blocks_of_a_file_come_back_as_they_were(tmp_path: Path) -> None:
    """Each tensor has the name, the shape and the bytes that it was loaded from, whatever the prefix."""
    from diffusers import SD3Transformer2DModel

    SD3Transformer2DModel(**cast(Any, SD3)).save_config(tmp_path)
    original = {f"model.diffusion_model.{name}": value for name, value in sd3_original("Q4_0").items()}
    path = write(tmp_path / "x.gguf", original)
    model: Any = qexp.load(path, device="cpu", compute_dtype="fp32")
    qexp.save(model, tmp_path / "saved", layout="file")
    found = tensors_of(tmp_path / "saved" / "model.gguf")
    assert found.keys() == original.keys()
    for name, (kind, data) in original.items():
        values = np.asarray(found[name].data).reshape(data.shape)
        assert np.array_equal(values, data.astype(values.dtype)), name
        assert found[name].tensor_type.name == ("F32" if kind == "F16" else kind)
    assert torch.equal(answer(qexp.load(tmp_path / "saved", device="cpu")), answer(model))


def test_what_the_file_cannot_hold_is_refused_from_headers(authors_sd3: Path, flux: Path, tmp_path: Path) -> None:
    for path, backend, words in (
        (authors_sd3, mixed({"modules": "**.to_k", "backend": "gguf"}, {"backend": "gguf_q4_0"}),
         r"'transformer_blocks.0.attn.to_q', 'transformer_blocks.0.attn.to_k', .* are one "
         r"tensor of the file \('joint_blocks.0.x_block.attn.qkv.weight'\), and cannot be in gguf Q4_0 and gguf Q8_0; "
         "give them one format"),
        (authors_sd3, mixed({"modules": "**.to_k", "backend": "none"}, {"backend": "gguf"}), "Q8_0 and unquantized"),
        (authors_sd3, settings("quanto").backend, "save.layout=file is for GGUF, not for quanto; use backend=gguf"),
        (flux, settings("gguf").backend, "save.layout=file: the checkpoint has the network's own names"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            check_file_layouts([prepared(path, backend)])
    check_file_layouts([prepared(authors_sd3, settings("gguf").backend), prepared(flux, settings("none").backend)])
    with pytest.raises(ConfigError, match="is for GGUF, not for none"):
        check_file_layouts([prepared(authors_sd3, settings("none").backend)])
    with pytest.raises(ConfigError, match="not for quanto"):
        qexp.save(qexp.load(authors_sd3, "quanto", device="cpu"), tmp_path, layout="file")
    assert not any(tmp_path.iterdir())


def test_tied_tensors_are_one_of_the_file_and_others_have_no_place() -> None:
    tensor = torch.ones(2, 3)
    layout = {"file.w": FileTensor((2, 3), (Part("a", 0, 6, 0, 24, is_computed=False),), is_whole=True)}
    assert list(InFileLayout({"a": tensor, "b": tensor}, layout)) == ["file.w"]
    with pytest.raises(ConfigError, match="the file has no place for 'b'"):
        InFileLayout({"a": tensor, "b": tensor.clone()}, layout)


def test_a_run_says_before_it_reads_weights_that_there_is_no_such_layout(tmp_path: Path) -> None:
    config = run_config("backend=gguf", "save.layout=file", f"save.path={tmp_path / 'saved'}", "device=cpu")
    with pytest.raises(ConfigError, match="the checkpoint has the network's own names"):
        run_experiment(config, tmp_path)
    assert not (tmp_path / "plan.json").exists() and not (tmp_path / "saved").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["save.layout=comfyui", "save.path=x"], "save.layout=comfyui is unknown; use file, or null"),
        (["save.layout=file"], "save.layout=file needs a place to save to; set save.path"),
    ],
)
def test_layout_that_is_none_or_has_no_place_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        run_config(*words)
