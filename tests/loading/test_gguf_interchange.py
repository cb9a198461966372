"""`.gguf` files of real architectures: diffusers' single-file loader and this program open the same ones, with the same
bytes, in the layout of diffusers and in that of the models' authors (which ComfyUI uses)."""

import json
from itertools import product
from pathlib import Path
from typing import Any, cast

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qexp.checkpoints.checkpoint import open_checkpoint
from qexp.checkpoints.gguf_types import ENCODABLE
from qexp.config.offload import OffloadConfig
from qexp.config.schema import LoaderConfig
from qexp.errors import LoadError
from qexp.loading.lifecycle import load_component, request_load
from qexp.loading.prepare import load_quantizer_of, prepare
from qexp.loading.saving import save_model
from qexp.models.folder import FolderSource
from qexp.offloading.strategies import apply_offload
from qexp.quantizers.gguf_blocks.tensor import GGUFTensor
from tests.backends import CPU
from tests.loading.test_gguf_loading import blocks, write
from tests.loading.toys import settings
from tests.products import diagonal, representatives
from tests.quantizers.test_contract import gaussian

BF16, FP32 = torch.bfloat16, torch.float32
FLUX = {"in_channels": 64, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 32, "num_attention_heads": 8,
        "joint_attention_dim": 256, "pooled_projection_dim": 256, "axes_dims_rope": (8, 12, 12)}  # fmt: skip
TRUE_FLUX = FLUX | {"num_attention_heads": 24, "attention_head_dim": 128, "joint_attention_dim": 4096,
                    "pooled_projection_dim": 768, "guidance_embeds": True, "axes_dims_rope": (16, 56, 56)}  # fmt: skip
SD3 = {"sample_size": 8, "in_channels": 4, "num_layers": 2, "attention_head_dim": 32, "num_attention_heads": 8,
       "joint_attention_dim": 256, "caption_projection_dim": 256, "pooled_projection_dim": 256, "out_channels": 4,
       "pos_embed_max_size": 8}  # fmt: skip
THEIR_TYPES = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")  # that can be made from weights


def load_ours(path: Path, backend: str = "none", *overrides: str, **fields: Any) -> Any:
    """By the class that config.json names, as `qexp.load` does."""
    source = FolderSource(path, None)
    chosen = settings(backend, *overrides, **fields)
    return load_component(source, "model", chosen, device=CPU, loader=LoaderConfig()).model


def load_theirs(kind: Any, path: Path, config: Path, dtype: torch.dtype = FP32) -> Any:
    from diffusers import GGUFQuantizationConfig

    return kind.from_single_file(
        str(path),
        config=str(config),
        quantization_config=GGUFQuantizationConfig(compute_dtype=dtype),
        torch_dtype=dtype,
    )


def plain(tensor: Any) -> Tensor:
    """The bytes of a weight in blocks, ours or theirs; other tensors as they are."""
    return tensor.raw if isinstance(tensor, GGUFTensor) else torch.Tensor._make_subclass(Tensor, tensor)


def assert_same_weights(ours: nn.Module, theirs: nn.Module) -> None:
    mine, other = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == other.keys()
    for name, tensor in mine.items():
        assert torch.equal(plain(tensor), plain(other[name])), name
    assert any(isinstance(tensor, GGUFTensor) for tensor in mine.values())


def answer(model: Any) -> Tensor:
    dtype = model.proj_out.bias.dtype
    if (
        isinstance(model.config, dict)
        and "joint_attention_dim" in model.config
        and "pos_embed_max_size" in model.config
    ):
        inputs = {"hidden_states": gaussian(1, 4, 8, 8), "encoder_hidden_states": gaussian(1, 3, 256, seed=1),
                  "pooled_projections": gaussian(1, 256, seed=2), "timestep": torch.tensor([0.5])}  # fmt: skip
    else:
        inputs = {"hidden_states": gaussian(1, 4, 64), "encoder_hidden_states": gaussian(1, 3, 256, seed=1),
                  "pooled_projections": gaussian(1, 256, seed=2), "timestep": torch.tensor([0.5]),
                  "img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(3, 3)}  # fmt: skip
    with torch.no_grad():
        output: Tensor = model(**{name: value.to(dtype) for name, value in inputs.items()}).sample
    return output


def relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("flux")
    FluxTransformer2DModel(**cast(Any, FLUX)).to(BF16).save_pretrained(folder)
    return folder


# The layout of diffusers


@pytest.mark.parametrize("name", representatives(THEIR_TYPES, [*THEIR_TYPES][:2]))
def test_what_is_saved_here_is_opened_there_and_here(name: str, flux: Path, tmp_path: Path) -> None:
    from diffusers import FluxTransformer2DModel

    ours = load_ours(flux, "gguf", f"quant_type={name}", compute_dtype="float32")
    files = save_model(ours, tmp_path)
    assert [file.name for file in files] == ["config.json", "model.gguf"]
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    theirs = load_theirs(FluxTransformer2DModel, tmp_path / "model.gguf", tmp_path)
    assert_same_weights(ours, theirs)
    assert relative(answer(theirs), answer(ours)) < 1e-3  # they decode in fp16
    again = load_ours(tmp_path / "model.gguf")
    assert torch.equal(answer(again), answer(ours))
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    for tensor in reader.tensors:
        mine = plain(ours.state_dict()[tensor.name]).numpy()
        assert np.array_equal(np.asarray(tensor.data).reshape(mine.shape), mine), tensor.name
    save_model(again, tmp_path / "again")
    assert (tmp_path / "again" / "model.gguf").read_bytes() == (tmp_path / "model.gguf").read_bytes()


@pytest.mark.parametrize(("strategy", "to"), diagonal(["leaf", "block"], ["cpu", "disk"]))
def test_a_model_is_saved_while_it_is_offloaded(to: str, strategy: str, flux: Path, tmp_path: Path) -> None:
    ours = load_ours(flux, "gguf_q4_0")
    expected = answer(ours)
    save_model(ours, tmp_path / "resident")
    config = OffloadConfig(strategy=strategy, to=to).resolved("cpu")
    blocks_of = ["transformer_blocks", "single_transformer_blocks"]
    apply_offload(ours, config, device=CPU, block_lists=blocks_of, store=tmp_path / "store")
    assert torch.equal(answer(ours), expected)
    save_model(ours, tmp_path / "offloaded")
    one, other = (tmp_path / name / "model.gguf" for name in ("resident", "offloaded"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("name", representatives(ENCODABLE, ["Q8_0", "Q5_1", "MXFP4", "TQ1_0"]))
def test_every_type_that_can_be_made_is_saved_and_reloaded(name: str, flux: Path, tmp_path: Path) -> None:
    """In bf16: the file says so, and norms and biases come back from its fp32 exactly."""
    ours = load_ours(flux, "gguf", f"quant_type={name}")
    save_model(ours, tmp_path)
    again = load_ours(tmp_path)
    for key, tensor in ours.state_dict().items():
        other = again.state_dict()[key]
        assert tensor.dtype == other.dtype and torch.equal(plain(tensor), plain(other)), key
    assert torch.equal(answer(again), answer(ours))
    assert again.hf_quantizer.config.quant_type == name


# The layout of the models' authors


def sd3_original(weight_type: str) -> dict[str, tuple[str, np.ndarray]]:
    """A tiny SD3 as its authors name and group it."""
    tensors: dict[str, tuple[str, np.ndarray]] = {}

    def linear(name: str, rows: int, columns: int = 256) -> None:
        seed = len(tensors)
        tensors[f"{name}.weight"] = (weight_type, blocks(weight_type, rows, columns, seed, 1e-3, 0.1))
        tensors[f"{name}.bias"] = ("F32", gaussian(rows, seed=seed).numpy())

    tensors["pos_embed"] = ("F16", gaussian(1, 64, 256).half().numpy())
    tensors["x_embedder.proj.weight"] = ("F16", gaussian(256, 4, 2, 2).half().numpy())
    tensors["x_embedder.proj.bias"] = ("F32", gaussian(256).numpy())
    for name in ("t_embedder.mlp.0", "t_embedder.mlp.2", "y_embedder.mlp.0", "y_embedder.mlp.2", "context_embedder"):
        linear(name, 256)
    for number in range(2):
        for side in ("x_block", "context_block"):
            place, last = f"joint_blocks.{number}.{side}", number == 1 and side == "context_block"
            linear(f"{place}.attn.qkv", 3 * 256)
            linear(f"{place}.adaLN_modulation.1", (2 if last else 6) * 256)
            if not last:
                linear(f"{place}.attn.proj", 256)
                linear(f"{place}.mlp.fc1", 1024)
                linear(f"{place}.mlp.fc2", 256, 1024)
    linear("final_layer.linear", 16)
    linear("final_layer.adaLN_modulation.1", 512)
    return tensors


@pytest.mark.parametrize(
    ("prefix", "name"),
    representatives(
        product(["", "model.diffusion_model."], ["Q8_0", "Q4_0", "Q4_K", "Q6_K", "Q2_K", "IQ4_XS"]),
        [("", "Q4_0"), ("", "IQ4_XS"), ("model.diffusion_model.", "Q4_K")],
    ),
)
def test_the_authors_layout_is_converted_without_touching_a_block(name: str, prefix: str, tmp_path: Path) -> None:
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    SD3Transformer2DModel(**cast(Any, SD3)).save_config(tmp_path)
    tensors = {prefix + key: value for key, value in sd3_original(name).items()}
    path = write(tmp_path / "x.gguf", tensors)
    ours, theirs = load_ours(path), load_theirs(SD3Transformer2DModel, path, tmp_path)
    assert_same_weights(ours, theirs)
    one, other = answer(ours), answer(theirs)
    assert one.isfinite().all() and relative(other, one) < 5e-3  # they decode in fp16
    qkv = tensors[f"{prefix}joint_blocks.0.x_block.attn.qkv.weight"][1]
    assert np.array_equal(ours.transformer_blocks[0].attn.to_k.weight.raw.numpy(), qkv[256:512])
    save_model(ours, tmp_path / "saved")  # in the layout of diffusers
    assert torch.equal(answer(load_ours(tmp_path / "saved")), one)


def flux_original_shapes() -> dict[str, tuple[int, ...]]:
    """FLUX.1-dev, cut to one block of each kind, as its authors name and group it."""
    width, weights = 3072, {"img_in": (3072, 64), "txt_in": (3072, 4096), "final_layer.linear": (64, 3072)}
    for name, columns in (("time_in", 256), ("vector_in", 768), ("guidance_in", 256)):
        weights |= {f"{name}.in_layer": (width, columns), f"{name}.out_layer": (width, width)}
    weights["final_layer.adaLN_modulation.1"] = (2 * width, width)
    for side in ("img", "txt"):
        place = f"double_blocks.0.{side}"
        weights |= {f"{place}_mod.lin": (6 * width, width), f"{place}_attn.qkv": (3 * width, width)}
        weights |= {f"{place}_attn.proj": (width, width), f"{place}_mlp.0": (4 * width, width)}
        weights[f"{place}_mlp.2"] = (width, 4 * width)
    weights |= {"single_blocks.0.modulation.lin": (3 * width, width), "single_blocks.0.linear1": (7 * width, width)}
    weights["single_blocks.0.linear2"] = (width, 5 * width)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (rows, columns) in weights.items():
        shapes |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
    norms = [f"double_blocks.0.{side}_attn.norm" for side in ("img", "txt")] + ["single_blocks.0.norm"]
    return shapes | {f"{norm}.{part}_norm.scale": (128,) for norm in norms for part in ("query", "key")}


def sparse_gguf(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """A file with Q4_K weights in which nothing but the header is written."""
    writer, nbytes = gguf.GGUFWriter(path, "flux"), 0
    for name, shape in shapes.items():
        if len(shape) == 2 and shape[1] % 256 == 0:
            size, kind = shape[0] * shape[1] // 256 * 144, gguf.GGMLQuantizationType.Q4_K
            writer.add_tensor_info(name, (shape[0], shape[1] // 256 * 144), np.dtype(np.uint8), size, kind)
        else:
            size = 4 * int(np.prod(shape))
            writer.add_tensor_info(name, shape, np.dtype(np.float32), size)
        nbytes += -(-size // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.truncate(-(-path.stat().st_size // 32) * 32 + nbytes)
    return path


def test_flux_at_its_true_width_is_planned_from_the_header(tmp_path: Path) -> None:
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        FluxTransformer2DModel(**cast(Any, TRUE_FLUX)).save_config(tmp_path)
    shapes = flux_original_shapes()
    path = sparse_gguf(tmp_path / "x.gguf", shapes)
    checkpoint, source = open_checkpoint(path), FolderSource(path, None)
    backend = settings("none")
    request = request_load(source, "model", backend, device=CPU)
    plan = prepare(request, load_quantizer_of(request)).plan
    assert plan.unused == () and plan.to_container()["read_bytes"] == checkpoint.nbytes
    assert set(plan.skipped) == {"x_embedder"}  # 64 columns
    places = {item.target: item.source for item in plan.items}
    row = 3072 // 256 * 144
    linear1 = checkpoint.entries["single_blocks.0.linear1.weight"].offset
    for number, name in enumerate(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")):
        found = places[f"single_transformer_blocks.0.{name}.weight"]
        assert found.offset == linear1 + number * 3072 * row
        assert found.nbytes == (12288 if name == "proj_mlp" else 3072) * row
    swapped, whole = places["norm_out.linear.weight"], checkpoint.entries["final_layer.adaLN_modulation.1.weight"]
    assert [piece.offset for piece in swapped.pieces] == [whole.offset + 3072 * row, whole.offset]


def test_a_file_of_another_model_is_refused(flux: Path, tmp_path: Path) -> None:
    from diffusers import FluxTransformer2DModel

    FluxTransformer2DModel(**cast(Any, FLUX)).save_config(tmp_path)
    path = write(tmp_path / "x.gguf", sd3_original("Q8_0"))
    with pytest.raises(LoadError, match=r"cannot convert the tensors of .* \(IndexError.*belongs to another model"):
        load_ours(path)


def test_an_incomplete_file_in_our_own_layout_is_not_taken_for_another_layout(flux: Path, tmp_path: Path) -> None:
    save_model(load_ours(flux, "gguf"), tmp_path)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    kept = {t.name: (t.tensor_type.name, t.data) for t in reader.tensors if t.name != "proj_out.bias"}
    path = write(tmp_path / "other.gguf", kept)
    with pytest.raises(LoadError, match=r"lacks 'proj_out\.bias'"):
        load_ours(path)
