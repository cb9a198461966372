"""A weight in GGUF blocks on an ordinary linear layer: copies, moves, pickles, state dicts, training."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from qexp.offloading.payload import flatten, leaves
from qexp.quantizers.gguf import GGUFConfig, GGUFQuantizer
from qexp.quantizers.gguf_blocks import tensor
from qexp.quantizers.gguf_blocks.tensor import GGUFTensor
from qexp.quantizers.rows import WeightSpec
from tests.backends import CPU
from tests.quantizers.test_contract import gaussian

ROWS, COLUMNS = 96, 128


def layer(dtype: torch.dtype = torch.float32, bias: bool = True) -> Any:
    linear = nn.Linear(COLUMNS, ROWS, bias=bias, dtype=dtype).eval()
    spec = WeightSpec("x", (ROWS, COLUMNS), dtype)
    weight = gaussian(ROWS, COLUMNS, dtype=dtype)
    linear.weight = GGUFQuantizer(GGUFConfig(quant_type="Q5_1")).create_quantized_param(spec, [weight], {}, CPU)
    return linear.requires_grad_(False)


X = gaussian(2, 3, COLUMNS, seed=1)


def test_it_is_a_parameter_that_looks_dense_and_holds_blocks() -> None:
    weight = layer(torch.bfloat16).weight
    assert isinstance(weight, nn.Parameter)
    assert (weight.shape, weight.dtype, weight.requires_grad) == ((ROWS, COLUMNS), torch.bfloat16, False)
    (raw,) = leaves(weight)
    assert raw.data_ptr() == weight.raw.data_ptr()
    assert (raw.shape, raw.dtype) == ((ROWS, COLUMNS // 32 * 24), torch.uint8)
    assert "Q5_1, 96x128, torch.bfloat16" in repr(weight)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", [(COLUMNS,), (1, COLUMNS), (2, 3, COLUMNS), (0, COLUMNS)], ids=str)
def test_chunks_of_rows_give_what_the_dense_weight_gives(
    shape: tuple[int, ...], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear, x = layer(bias=bias), gaussian(*shape, seed=1)
    expected = functional.linear(x, linear.weight.dequantize(), linear.bias)
    assert torch.equal(linear(x), expected)
    for rows in (1, 7, 95):
        monkeypatch.setitem(tensor.CHUNK_WEIGHTS, "cpu", rows * COLUMNS)
        assert torch.allclose(linear(x), expected, atol=1e-5)


def test_no_more_than_a_chunk_is_dense_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    largest, decoded_rows = [0], GGUFTensor.decoded_rows

    def watched(self: GGUFTensor, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        largest.append(stop - start)
        return decoded_rows(self, start, stop, dtype)

    monkeypatch.setattr(GGUFTensor, "decoded_rows", watched)
    monkeypatch.setitem(tensor.CHUNK_WEIGHTS, "cpu", 10 * COLUMNS)
    x = X.clone().requires_grad_()
    layer()(x).sum().backward()
    assert max(largest) == 10
    assert sum(largest) == 2 * ROWS  # forward and backward


def test_inputs_of_another_dtype_are_converted_and_the_result_back() -> None:
    linear = layer(torch.bfloat16)
    output = linear(X)
    assert output.dtype == torch.float32
    dense = linear.weight.dequantize()
    assert torch.equal(output, functional.linear(X.bfloat16(), dense, linear.bias).float())


WAYS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda linear: pickle.loads(pickle.dumps(linear)),
    "a move of a copy": lambda linear: copy.deepcopy(linear).to("cpu", torch.float64).to(torch.float32),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))
def test_copies_have_the_same_bytes_elsewhere(way: Any) -> None:
    linear = layer()
    expected, other = linear(X), way(linear)
    assert isinstance(other.weight, nn.Parameter) and type(other.weight) is GGUFTensor
    assert torch.equal(other(X), expected)
    other.weight.raw.zero_()
    assert torch.equal(linear(X), expected)


def test_state_dicts_are_loaded_in_place_and_assigned() -> None:
    linear, file = layer(), io.BytesIO()
    expected = linear(X)
    torch.save(linear.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    emptied = copy.deepcopy(linear).to("meta").to_empty(device="cpu")
    emptied.load_state_dict(state)
    assert torch.equal(emptied(X), expected)
    with pytest.raises(RuntimeError, match="not copied into each other"):
        nn.Linear(COLUMNS, ROWS).load_state_dict(state)
    other = GGUFQuantizer(GGUFConfig(quant_type="Q4_0"))
    spec = WeightSpec("x", (ROWS, COLUMNS), torch.float32)
    linear.weight = other.create_quantized_param(spec, [gaussian(ROWS, COLUMNS)], {}, CPU)
    with pytest.raises(RuntimeError, match="types and shapes must be equal"):
        linear.load_state_dict(state)
    linear.load_state_dict(state, assign=True)
    assert torch.equal(linear(X), expected)


def test_another_dtype_changes_no_byte() -> None:
    linear = layer()
    half = copy.deepcopy(linear).to(torch.float16)
    assert half.weight.dtype == torch.float16
    assert torch.equal(half.weight.raw, linear.weight.raw)
    assert torch.equal(half.weight.dequantize(), linear.weight.dequantize().half())
    assert torch.equal(half.float().weight.dequantize(), linear.weight.dequantize())


def test_other_bytes_can_take_the_place_of_its_own() -> None:
    """As offloading does it."""
    weight = layer().weight
    (raw,), rebuild = flatten([weight])
    other = raw.clone()
    (built,) = rebuild([other])
    assert isinstance(built, nn.Parameter)
    assert built.raw.data_ptr() == other.data_ptr()
    assert (built.quant_type, built.dtype, built.requires_grad) == ("Q5_1", torch.float32, False)
    assert torch.equal(built.dequantize(), weight.dequantize())


@pytest.mark.parametrize("rows", [10, ROWS])
def test_gradients_flow_to_inputs_and_biases_and_the_dense_weight_is_not_kept(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tensor.CHUNK_WEIGHTS, "cpu", rows * COLUMNS)
    linear, x = layer(), X.clone().requires_grad_()
    linear.bias.requires_grad_()
    dense, y = nn.Linear(COLUMNS, ROWS), X.clone().requires_grad_()
    dense.weight.data, dense.bias.data = linear.weight.dequantize(), linear.bias.detach().clone()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        output = linear(x)
    output.square().sum().backward()
    dense(y).square().sum().backward()
    assert torch.allclose(x.grad, y.grad, rtol=1e-4, atol=1e-3)
    assert torch.allclose(linear.bias.grad, dense.bias.grad, rtol=1e-4, atol=1e-3)
    assert not kept
    assert linear.weight.grad is None


def test_a_low_rank_adapter_learns_beside_frozen_blocks() -> None:
    torch.manual_seed(0)
    frozen, down, up = layer(), nn.Linear(COLUMNS, 4, bias=False), nn.Linear(4, ROWS, bias=False)
    nn.init.zeros_(up.weight)
    first = nn.Linear(COLUMNS, COLUMNS)  # so that the gradient has to pass through the blocks
    optimizer = torch.optim.SGD([*down.parameters(), *up.parameters(), *first.parameters()], 1e-4)
    before, losses = frozen.weight.raw.clone(), []
    for _ in range(5):
        optimizer.zero_grad()
        hidden = first(X)
        loss = (frozen(hidden) + up(down(hidden))).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
    assert first.weight.grad.abs().sum() > 0
    assert torch.equal(frozen.weight.raw, before)


def test_inference_mode_gives_the_same() -> None:
    linear = layer()
    with torch.inference_mode():
        inside = linear(X)
    assert torch.equal(inside, linear(X))


def test_accelerates_hooks_move_it() -> None:
    import accelerate

    model = nn.Sequential(layer(), nn.ReLU(), nn.Linear(ROWS, 8)).requires_grad_(False)
    expected = model(X)
    accelerate.cpu_offload(model, execution_device=CPU)
    assert model[0].weight.is_meta
    assert torch.equal(model(X), expected)
    assert torch.equal(model(X), expected)


def test_what_only_dense_weights_can_do_is_refused_with_its_remedy() -> None:
    weight = layer().weight
    for operation in (lambda: weight * 2, lambda: weight.sum(), lambda: X @ weight.t()):
        with pytest.raises(NotImplementedError, match=r"only linear layers are; use weight\.dequantize"):
            operation()
    with pytest.raises(NotImplementedError, match="can only be the weight"):
        functional.linear(weight, X[0])
