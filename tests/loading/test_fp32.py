"""Modules that a user keeps in fp32 get fp32 and give the compute dtype, whatever their arguments look like."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qexp
from qexp.loading.fp32 import compute_in_fp32
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
