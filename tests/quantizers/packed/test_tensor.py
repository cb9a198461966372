"""A packed weight in a layer: it computes, moves, copies and compares, and refuses what it cannot do."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qexp.offloading.payload import flatten, leaves
from qexp.quantizers.packed import tensor
from qexp.quantizers.packed.codes import decode, encode
from qexp.quantizers.packed.tensor import PackedTensor
from tests.quantizers.test_contract import gaussian

KINDS = ["uint3wo", "fp6_e3w2"]  # with and without an offset
ROWS, COLUMNS = 100, 192


def packed(quant_type: str = "uint4wo", dtype: torch.dtype = torch.float32, seed: int = 0) -> PackedTensor:
    weight = gaussian(ROWS, COLUMNS, dtype=dtype, seed=seed)
    return PackedTensor(encode(weight, quant_type, COLUMNS // 64), quant_type, weight.shape, dtype)


def layer(weight: PackedTensor, bias: bool = True) -> nn.Linear:
    new = nn.Linear(COLUMNS, ROWS, bias=bias, dtype=weight.dtype).requires_grad_(False)
    new.weight = nn.Parameter(weight, requires_grad=False)
    return new


@pytest.fixture(params=[1000, 1 << 18], ids=["in slices", "whole"])
def slice_weights(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setitem(tensor.DECODED_WEIGHTS, "cpu", request.param)
    return int(request.param)


@pytest.mark.parametrize("shape", [(COLUMNS,), (3, COLUMNS), (2, 5, COLUMNS), (0, COLUMNS)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("kind", KINDS)
def test_linear_is_that_of_the_dense_weight(kind: str, bias: bool, shape: tuple[int, ...], slice_weights: int) -> None:
    for dtype, tolerance in [(torch.float32, 1e-6), (torch.bfloat16, 0.01), (torch.float16, 1e-3)]:
        module = layer(packed(kind, torch.bfloat16), bias).to("cpu")
        module.bias = nn.Parameter(gaussian(ROWS, dtype=dtype, seed=5), requires_grad=False) if bias else None
        x = gaussian(*shape, dtype=dtype, seed=1)  # of another dtype than the weight had: the input's is computed in
        dense = nn.functional.linear(x, module.weight.dequantize(dtype), module.bias)
        output = module(x)
        assert output.dtype == dtype and output.shape == dense.shape
        assert (output - dense).float().norm() <= tolerance * dense.float().norm()


@pytest.mark.parametrize("kind", KINDS)
def test_dequantize_rounds_once(kind: str, slice_weights: int) -> None:
    weight = packed(kind, torch.bfloat16)
    dense = weight.dequantize(torch.float32)
    assert torch.equal(dense, decode(weight.inner_tensors, kind, COLUMNS))
    assert weight.dequantize().dtype == torch.bfloat16
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(weight.dequantize(dtype), dense.to(dtype))
    original = gaussian(ROWS, COLUMNS, dtype=torch.bfloat16).float()
    assert (dense - original).norm() < 0.2 * original.norm()


class Largest(TorchDispatchMode):
    """The most elements that any tensor made inside has."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.numel = max(self.numel, result.numel())
        return result


@pytest.mark.parametrize("kind", KINDS)
def test_no_more_than_a_slice_is_dense_at_a_time(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tensor.DECODED_WEIGHTS, "cpu", 5 * COLUMNS)
    module, x = layer(packed(kind)), gaussian(2, COLUMNS).requires_grad_()
    with Largest() as largest:
        module(x).sum().backward()
    assert largest.numel == 5 * COLUMNS


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_flow_through_to_what_trains(kind: str, slice_weights: int) -> None:
    """As to an adapter in front, and to a bias; the weight stays as it is."""
    module, x = layer(packed(kind)), gaussian(2, 3, COLUMNS).requires_grad_()
    module.bias.requires_grad_()
    target = gaussian(2, 3, ROWS, seed=2)
    (module(x) * target).sum().backward()
    dense, y = module.weight.dequantize(), x.detach().clone().requires_grad_()
    bias = module.bias.detach().clone().requires_grad_()
    (nn.functional.linear(y, dense, bias) * target).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(module.bias.grad, bias.grad)
    assert module.weight.grad is None and not module.weight.requires_grad


def test_autocast_computes_in_its_dtype_as_for_a_dense_weight() -> None:
    module, x = layer(packed()), gaussian(2, COLUMNS)
    with torch.autocast("cpu", torch.bfloat16):
        output = module(x)
        dense = nn.functional.linear(x, module.weight.dequantize(), module.bias)
    assert output.dtype == dense.dtype == torch.bfloat16
    torch.testing.assert_close(output, dense, rtol=0.02, atol=0.02)


def saved_and_loaded(weight: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(weight, file)
    file.seek(0)
    return torch.load(file, weights_only=True)  # type: ignore[no-any-return]


COPIES: dict[str, Callable[[Any], Any]] = {
    "clone": lambda weight: weight.clone(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda weight: pickle.loads(pickle.dumps(weight)),
    "torch.save": saved_and_loaded,
    "to, copying": lambda weight: weight.to("cpu", copy=True),
    "flatten": lambda weight: flatten([weight])[1]([leaf.clone() for leaf in leaves(weight)])[0],
}


@pytest.mark.parametrize("name", COPIES)
@pytest.mark.parametrize("kind", KINDS)
def test_copies_are_equal_and_apart(kind: str, name: str) -> None:
    weight = nn.Parameter(packed(kind, torch.bfloat16), requires_grad=False)
    other = COPIES[name](weight)
    assert type(other) is PackedTensor
    assert torch.equal(other, weight)
    assert (other.shape, other.dtype, other.device) == (weight.shape, weight.dtype, weight.device)
    assert not other.requires_grad
    assert torch.equal(other.dequantize(), weight.dequantize())
    assert not {leaf.data_ptr() for leaf in leaves(other)} & {leaf.data_ptr() for leaf in leaves(weight)}
    other.qdata[3, 5] ^= 1
    assert not torch.equal(other, weight)


def test_detach_shares_the_bytes_and_parameters_stay_parameters() -> None:
    weight = nn.Parameter(packed(), requires_grad=False)
    assert [leaf.data_ptr() for leaf in leaves(weight.detach())] == [leaf.data_ptr() for leaf in leaves(weight)]
    for one in (weight, copy.deepcopy(weight), layer(packed()).weight):
        assert isinstance(one, nn.Parameter) and isinstance(one, PackedTensor)


def test_weights_of_different_formats_are_not_equal() -> None:
    weight = packed("fp6_e3w2")
    inner, shape = weight.inner_tensors, weight.shape
    assert torch.equal(weight, PackedTensor(inner, "fp6_e3w2", shape, torch.float32))
    for quant_type, dtype in [("fp6_e2w3", torch.float32), ("fp6_e3w2", torch.bfloat16)]:  # of the same bytes
        assert not torch.equal(weight, PackedTensor(inner, quant_type, shape, dtype))
    assert not torch.equal(weight, packed("uint6wo")) and not torch.equal(weight, packed("fp6_e3w2", seed=1))


def test_modules_move_and_load() -> None:
    module, other = layer(packed()), layer(packed(seed=1))
    x = gaussian(2, COLUMNS)
    assert not torch.equal(module(x), other(x))
    other.load_state_dict(module.state_dict())
    assert torch.equal(module(x), other(x))
    moved = copy.deepcopy(module).to("meta")
    assert moved.weight.device.type == "meta" and all(leaf.is_meta for leaf in leaves(moved.weight))
    moved.load_state_dict(module.state_dict(), assign=True)
    assert torch.equal(moved(x), module(x))
    with pytest.raises(RuntimeError, match="the formats differ; quantize again"):
        layer(packed("uint5wo")).load_state_dict(module.state_dict())


@pytest.mark.parametrize("cast", ["half", "double", "bfloat16"])
def test_a_cast_is_refused_with_its_remedy(cast: str) -> None:
    module = layer(packed())
    with pytest.raises(ValueError, match=r"packed as uint4wo cannot be cast to \w+\d+.*\.to\(device\).*dequantize\(\)"):
        getattr(module, cast)()
    assert module.float() is module  # as it was: nothing to cast


def test_what_is_not_defined_raises_and_says_what_is() -> None:
    weight, x = packed(), gaussian(2, COLUMNS)
    for operation in (lambda: weight + 1, lambda: x @ weight.T, lambda: weight.sum(), lambda: torch.equal(weight, x)):
        with pytest.raises(NotImplementedError, match="dequantize"):
            operation()
    with pytest.raises(NotImplementedError, match="only be the weight"):
        nn.functional.linear(weight, x)
    assert not weight.is_pinned()


def test_it_says_what_it_is() -> None:
    expected = (
        "PackedTensor(uint4wo, shape=[100, 192], group_size=64, dtype=torch.float32, device='cpu', bits_per_weight=4.5)"
    )
    assert repr(packed()) == repr(nn.Parameter(packed(), requires_grad=False)) == expected
