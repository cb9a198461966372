"""Where dtypes meet: modules that a user keeps in fp32, and networks of one pipeline in different dtypes."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import qexp
from qexp.loading.fp32 import cast_between, compute_in_fp32
from tests.products import exhaustive


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.seen: list[torch.dtype] = []

    def forward(self, x: Tensor, *, parts: dict[str, Tensor], index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        self.seen += [x.dtype, parts["a"].dtype, index.dtype]
        return self.linear(x), {"sum": x + parts["a"], "index": index}


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()
        self.after = nn.Linear(4, 4, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Any:
        y, parts = self.inner(x, parts={"a": x}, index=torch.arange(3))
        return self.after(y), parts


@pytest.mark.parametrize("clone", [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_tensors_are_cast_on_the_way_in_and_out(clone: Any) -> None:
    model = Outer()
    compute_in_fp32(model, ["inner"], torch.bfloat16)
    model = clone(model)
    y, parts = model(torch.randn(2, 4).bfloat16())
    assert model.inner.seen == [torch.float32, torch.float32, torch.int64]
    assert (y.dtype, parts["sum"].dtype, parts["index"].dtype) == (torch.bfloat16, torch.bfloat16, torch.int64)


def test_only_the_outermost_module_is_hooked_and_none_without_need() -> None:
    model = Outer()
    compute_in_fp32(model, ["inner", "**.linear"], torch.bfloat16)
    assert [name for name, module in model.named_modules() if module._forward_hooks] == ["inner"]
    other = Outer()
    compute_in_fp32(other, ["inner"], torch.float32)
    compute_in_fp32(other, [], torch.bfloat16)
    assert not any(module._forward_hooks for module in other.modules())


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Outer(), nn.ModuleDict({"a": nn.Linear(4, 4)})])

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.blocks[0](x)
        answer: Tensor = self.blocks[1]["a"](y)
        return answer


def test_what_a_container_holds_is_hooked_in_its_place() -> None:
    model = Listed().float()
    compute_in_fp32(model, ["blocks"], torch.bfloat16)
    assert [name for name, module in model.named_modules() if module._forward_hooks] == ["blocks.0", "blocks.1.a"]
    assert model(torch.randn(2, 4).bfloat16()).dtype == torch.bfloat16
    assert model.blocks[0].inner.seen[:2] == [torch.float32, torch.float32]


def ltx() -> tuple[nn.Module, dict[str, Tensor], dict[str, Any]]:
    from diffusers import LTXVideoTransformer3DModel

    model = LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
        num_layers=1, caption_channels=16,
    )  # fmt: skip
    grid = torch.stack(
        torch.meshgrid(torch.arange(3) / 3, torch.arange(300.0, 304), torch.arange(4) * 31.7, indexing="ij")
    ).flatten(1)
    handed_on = {"hidden_states": torch.randn(1, 48, 8), "encoder_hidden_states": torch.randn(1, 5, 16)}
    kept = {"timestep": torch.full((1, 48), 501.0), "encoder_attention_mask": torch.ones(1, 5, dtype=torch.int64)}
    return model, handed_on, {**kept, "video_coords": grid[None], "return_dict": False}


def flux() -> tuple[nn.Module, dict[str, Tensor], dict[str, Any]]:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    shapes = {"hidden_states": (1, 6, 16), "encoder_hidden_states": (1, 5, 8), "pooled_projections": (1, 8)}
    kept = {
        "timestep": torch.tensor([0.5011]), "guidance": torch.tensor([3.517]), "txt_ids": torch.zeros(5, 3),
        "img_ids": torch.arange(18.0).reshape(6, 3) + 300.7,
    }  # fmt: skip
    return model, {name: torch.randn(shape) for name, shape in shapes.items()}, {**kept, "return_dict": False}


def cogvideox() -> tuple[nn.Module, dict[str, Tensor], dict[str, Any]]:
    from diffusers import CogVideoXTransformer3DModel

    model = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=8,
        num_layers=1, sample_width=4, sample_height=4, sample_frames=5, max_text_seq_length=3,
        use_rotary_positional_embeddings=True,
    )  # fmt: skip
    angles = torch.rand(8, 16) * 300
    handed_on = {"hidden_states": torch.randn(1, 2, 4, 4, 4), "encoder_hidden_states": torch.randn(1, 3, 8)}
    kept = {"timestep": torch.tensor([501]), "image_rotary_emb": (angles.cos(), angles.sin())}
    return model, handed_on, {**kept, "return_dict": False}


@pytest.mark.parametrize("make", [ltx, flux, cogvideox])
def test_coordinates_between_dtypes_stay_in_fp32(make: Any) -> None:
    torch.manual_seed(0)
    model, handed_on, kept = make()
    model.requires_grad_(False).eval().bfloat16()
    in_bf16 = {name: value.bfloat16() for name, value in handed_on.items()}
    (expected,) = model(**in_bf16, **kept)
    (rounded,) = model(**in_bf16, **tree_map_only(Tensor, lambda x: x.bfloat16().to(x.dtype), kept))
    assert not torch.equal(rounded, expected)  # the positions matter
    cast_between([(model, torch.bfloat16), (nn.Linear(4, 4), torch.float32)])
    assert torch.equal(model(**handed_on, **kept)[0], expected)


class Called(nn.Module):
    def forward(self, x: Any, timestep_cond: Any, added: Any, img_ids: Any, *rest: Any) -> list[torch.dtype]:
        values = [x, timestep_cond, added["text_embeds"], added["time_ids"], img_ids, *rest]
        return [value.dtype for value in values]


def test_arguments_between_dtypes_by_position_and_in_dictionaries() -> None:
    value, (fp32, bf16) = torch.ones(2, 2), (torch.float32, torch.bfloat16)
    model = Called()
    cast_between([(model, bf16), (nn.Linear(4, 4), fp32)])
    added = {"text_embeds": value, "time_ids": value}
    assert model(value, value, added, value, value) == [bf16, bf16, bf16, fp32, fp32, fp32]
    assert model(x=value, timestep_cond=value, added=added, img_ids=value) == [bf16, bf16, bf16, fp32, fp32]


@pytest.mark.parametrize("dtype", [torch.bfloat16, exhaustive(torch.float16), exhaustive(torch.float32)])
def test_the_output_projections_of_t5_are_kept_as_transformers_keeps_them(tmp_path: Path, dtype: torch.dtype) -> None:
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 50}
    T5EncoderModel(T5Config(**sizes, feed_forward_proj="gated-gelu")).save_pretrained(tmp_path)
    theirs = T5EncoderModel.from_pretrained(tmp_path, dtype=dtype)
    ours: Any = qexp.load(tmp_path, "none", compute_dtype=dtype, device="cpu")
    tokens = torch.arange(1, 9)[None]
    with torch.no_grad():
        assert torch.equal(ours(tokens).last_hidden_state, theirs(tokens).last_hidden_state)
    assert {n: p.dtype for n, p in ours.named_parameters()} == {n: p.dtype for n, p in theirs.named_parameters()}
    quantized: Any = qexp.load(tmp_path, "torchao", compute_dtype=dtype, device="cpu")
    projection = quantized.encoder.block[1].layer[1].DenseReluDense.wo
    assert type(projection.weight) is nn.Parameter  # never quantized, in any dtype
    assert projection.weight.dtype == (torch.float32 if dtype == torch.float16 else dtype)
    assert type(quantized.encoder.block[1].layer[1].DenseReluDense.wi_0.weight.data) is not Tensor
