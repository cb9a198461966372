"""Which checkpoints are converted from their authors' layout: none that has the names of the model's own layers."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qexp
from qexp.errors import LoadError
from tests.products import representatives

NETWORKS: dict[str, dict[str, Any]] = {  # with few biases: quantized, hardly a tensor keeps its name
    "AuraFlowTransformer2DModel": {
        "sample_size": 32, "in_channels": 4, "num_mmdit_layers": 1, "num_single_dit_layers": 1,
        "attention_head_dim": 32, "num_attention_heads": 2, "caption_projection_dim": 64, "joint_attention_dim": 64,
        "out_channels": 4, "pos_embed_max_size": 256,
    },
    "Lumina2Transformer2DModel": {
        "sample_size": 16, "in_channels": 4, "hidden_size": 64, "num_layers": 1, "num_refiner_layers": 1,
        "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 32, "cap_feat_dim": 64,
        "axes_dim_rope": [8, 12, 12], "axes_lens": [16, 16, 16],
    },
    "CosmosTransformer3DModel": {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 1,
        "mlp_ratio": 2, "text_embed_dim": 64, "adaln_lora_dim": 16, "max_size": [4, 32, 32],
    },
    "SD3Transformer2DModel": {
        "sample_size": 32, "patch_size": 1, "in_channels": 4, "num_layers": 2, "attention_head_dim": 32,
        "num_attention_heads": 2, "joint_attention_dim": 64, "caption_projection_dim": 64,
        "pooled_projection_dim": 64, "out_channels": 4, "pos_embed_max_size": 96,
    },
}  # fmt: skip
WEIGHTS = "diffusion_pytorch_model.safetensors"


def save_network(name: str, folder: Path) -> Path:
    import diffusers

    torch.manual_seed(0)
    getattr(diffusers, name)(**NETWORKS[name]).save_pretrained(folder)
    return folder


def dense(model: Any) -> dict[str, torch.Tensor]:
    return dict(model.dequantize().state_dict())


@pytest.mark.parametrize(
    ("name", "backend", "file_name"),
    representatives(
        product(NETWORKS, ["torchao", "quanto"], [WEIGHTS, "weights.safetensors"]),
        [
            ("AuraFlowTransformer2DModel", "torchao", "weights.safetensors"),
            ("SD3Transformer2DModel", "quanto", WEIGHTS),
        ],
    ),
)
def test_quantized_checkpoint_of_diffusers_names_is_not_converted(
    name: str, backend: str, file_name: str, tmp_path: Path
) -> None:
    model = qexp.load(save_network(name, tmp_path / "dense"), backend, device="cpu")
    qexp.save(model, tmp_path / "saved")
    (tmp_path / "saved" / WEIGHTS).rename(tmp_path / "saved" / file_name)
    want, got = dense(model), dense(qexp.load(tmp_path / "saved", device="cpu"))
    assert want.keys() == got.keys() and all(torch.equal(want[key], got[key]) for key in want)


@pytest.mark.parametrize("file_name", [WEIGHTS, "weights.safetensors"])
def test_checkpoint_that_lacks_layers_is_said_to_lack_them(file_name: str, tmp_path: Path) -> None:
    """Not to be another model's, which is what a conversion says of names that it does not know."""
    folder = save_network("SD3Transformer2DModel", tmp_path)
    tensors = load_file(folder / WEIGHTS)
    kept = {key: tensor for key, tensor in tensors.items() if not key.startswith("transformer_blocks.1.")}
    (folder / WEIGHTS).unlink()
    save_file(kept, folder / file_name, {"format": "pt"})
    with pytest.raises(LoadError, match=r"lacks 'transformer_blocks\.1\."):
        qexp.load(folder, device="cpu")


def test_single_file_in_its_authors_layout_is_converted(tmp_path: Path) -> None:
    """SD3's last norm has shift and scale the other way round there: what a conversion of own names would exchange."""
    from diffusers import SD3Transformer2DModel

    folder = save_network("SD3Transformer2DModel", tmp_path)
    own = SD3Transformer2DModel.from_pretrained(folder).state_dict()
    tensors = _authors_layout(own)
    save_file(tensors, tmp_path / "sd3.safetensors")
    (tmp_path / WEIGHTS).unlink()
    model = qexp.load(tmp_path / "sd3.safetensors", device="cpu")
    got = model.state_dict()
    assert got.keys() == own.keys() and all(torch.equal(got[key], own[key]) for key in own)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "SD3Transformer2DModel"


def _authors_layout(own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Stability's names for an SD3 of two blocks, written down from their model.py; the inverse of the conversion."""
    result = {
        "pos_embed": own["pos_embed.pos_embed"],
        "x_embedder.proj.weight": own["pos_embed.proj.weight"],
        "x_embedder.proj.bias": own["pos_embed.proj.bias"],
        "final_layer.linear.weight": own["proj_out.weight"],
        "final_layer.linear.bias": own["proj_out.bias"],
    }
    for kind in ("weight", "bias"):
        scale, shift = own[f"norm_out.linear.{kind}"].chunk(2)
        result[f"final_layer.adaLN_modulation.1.{kind}"] = torch.cat([shift, scale])
        result[f"context_embedder.{kind}"] = own[f"context_embedder.{kind}"]
        for theirs, ours in (("t_embedder", "timestep_embedder"), ("y_embedder", "text_embedder")):
            for number in (0, 2):
                result[f"{theirs}.mlp.{number}.{kind}"] = own[f"time_text_embed.{ours}.linear_{number // 2 + 1}.{kind}"]
        for block in range(2):
            place, there = f"transformer_blocks.{block}", f"joint_blocks.{block}"
            q, k, v = (own[f"{place}.attn.to_{letter}.{kind}"] for letter in "qkv")
            result[f"{there}.x_block.attn.qkv.{kind}"] = torch.cat([q, k, v])
            added = [own[f"{place}.attn.add_{letter}_proj.{kind}"] for letter in "qkv"]
            result[f"{there}.context_block.attn.qkv.{kind}"] = torch.cat(added)
            result[f"{there}.x_block.attn.proj.{kind}"] = own[f"{place}.attn.to_out.0.{kind}"]
            result[f"{there}.x_block.adaLN_modulation.1.{kind}"] = own[f"{place}.norm1.linear.{kind}"]
            result[f"{there}.x_block.mlp.fc1.{kind}"] = own[f"{place}.ff.net.0.proj.{kind}"]
            result[f"{there}.x_block.mlp.fc2.{kind}"] = own[f"{place}.ff.net.2.{kind}"]
            context = own[f"{place}.norm1_context.linear.{kind}"]
            if block == 1:  # of the last block, the context only gives keys and values
                scale, shift = context.chunk(2)
                context = torch.cat([shift, scale])
            else:
                result[f"{there}.context_block.attn.proj.{kind}"] = own[f"{place}.attn.to_add_out.{kind}"]
                result[f"{there}.context_block.mlp.fc1.{kind}"] = own[f"{place}.ff_context.net.0.proj.{kind}"]
                result[f"{there}.context_block.mlp.fc2.{kind}"] = own[f"{place}.ff_context.net.2.{kind}"]
            result[f"{there}.context_block.adaLN_modulation.1.{kind}"] = context
    return {name: tensor.contiguous() for name, tensor in result.items()}
