"""A packed weight as a tensor that an ordinary linear layer can hold.

`PackedTensor` has the shape and dtype of the weight it stands for, and its bytes in two or three inner tensors: qdata,
scale and, for integers, offset. `torch.nn.functional.linear` takes it as a weight; it can be moved, copied, compared
with `torch.equal`, pickled, loaded into, and turned back by `dequantize()`. Nothing else is defined on it: an
operation that would quietly work on the dense weight raises instead.

The linear layer turns slices of whole rows back, in the dtype of its input, multiplies, and forgets them: it needs
memory for one slice and not for the weight, in the backward pass too. The weight itself has no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from qexp.errors import ConfigError
from qexp.quantizers.in_place import call_unless_in_place
from qexp.quantizers.packed.codes import decode

aten = torch.ops.aten
DECODED_WEIGHTS = {"cpu": 1 << 19, "cuda": 1 << 24}  # at a time, by a layer


class PackedTensor(Tensor):
    """A weight [out, in] in packed form. quant_type: a key of `elements.ELEMENTS`; inner: see `codes.py`."""

    qdata: Tensor
    scale: Tensor
    refuses_in_place = True

    @staticmethod
    def __new__(
        cls, inner: dict[str, Tensor], quant_type: str, shape: Sequence[int], dtype: torch.dtype
    ) -> PackedTensor:
        wrapper = Tensor._make_wrapper_subclass
        return wrapper(cls, tuple(shape), dtype=dtype, device=inner["qdata"].device)

    def __init__(self, inner: dict[str, Tensor], quant_type: str, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.quant_type = quant_type
        self.inner_names = tuple(inner)
        vars(self).update(inner)

    @property
    def inner_tensors(self) -> dict[str, Tensor]:
        return {name: vars(self)[name] for name in self.inner_names}

    @property
    def group_size(self) -> int:
        return self.shape[1] // self.scale.shape[1]

    def __tensor_flatten__(self) -> tuple[list[str], tuple[str, torch.dtype]]:
        return list(self.inner_names), (self.quant_type, self.dtype)

    @classmethod
    def __tensor_unflatten__(
        cls, inner: dict[str, Tensor], context: tuple[str, torch.dtype], size: Sequence[int], stride: Sequence[int]
    ) -> PackedTensor:
        return cls(inner, context[0], size, context[1])

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the dense weight [out, in] in `dtype`, by default that of the weight that was packed."""
        dense = torch.empty(self.shape, dtype=dtype or self.dtype, device=self.device)
        for rows, part in self.dense_slices(dense.dtype):
            dense[rows] = part
        return dense

    def dense_slices(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Yield the dense weight in slices of whole rows, [some rows, in]."""
        step = max(DECODED_WEIGHTS.get(self.device.type, DECODED_WEIGHTS["cpu"]) // self.shape[1], 1)
        for start in range(0, self.shape[0], step):
            rows = slice(start, start + step)
            part = decode(
                {name: tensor[rows] for name, tensor in self.inner_tensors.items()}, self.quant_type, self.shape[1]
            )
            yield rows, part.to(dtype)

    def __repr__(self) -> str:  # type: ignore[override]
        bits = 8 * sum(tensor.nbytes for tensor in self.inner_tensors.values()) / max(self.numel(), 1)
        return (
            f"PackedTensor({self.quant_type}, shape={list(self.shape)}, group_size={self.group_size}, "
            f"dtype={self.dtype}, device='{self.device}', bits_per_weight={bits:.4g})"
        )

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is linear:
            return _multiply_packed(*args, **(kwargs or {}))
        return call_unless_in_place(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in OPERATIONS:
            raise NotImplementedError(
                f"{func} is not defined on a packed weight; call a linear layer with it, or dequantize() it first"
            )
        return OPERATIONS[func](func, *args, **(kwargs or {}))


def _on_inner(func: Any, tensor: PackedTensor, **options: Any) -> PackedTensor:
    """Return the operation on each inner tensor."""
    inner = {name: func(value, **options) for name, value in tensor.inner_tensors.items()}
    return PackedTensor(inner, tensor.quant_type, tensor.shape, tensor.dtype)


def _to_copy(func: Any, tensor: PackedTensor, **options: Any) -> PackedTensor:
    dtype = options.pop("dtype", None)
    if dtype not in (None, tensor.dtype):
        raise ConfigError(
            f"a weight packed as {tensor.quant_type} cannot be cast to {str(dtype).removeprefix('torch.')}: its codes "
            "have no dtype. It computes in that of a layer's input; move it with .to(device), or dequantize() it first"
        )
    return _on_inner(func, tensor, **options)


def _equal(func: Any, one: Tensor, other: Tensor) -> bool:
    if not (isinstance(one, PackedTensor) and isinstance(other, PackedTensor)):
        raise NotImplementedError(
            "a packed weight equals packed weights only; dequantize() it to compare it with others"
        )
    return _same_format(one, other) and all(
        func(one.inner_tensors[name], other.inner_tensors[name]) for name in one.inner_names
    )


def _copy(func: Any, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """Copy as `load_state_dict` does."""
    if not (isinstance(target, PackedTensor) and isinstance(source, PackedTensor) and _same_format(target, source)):
        raise ConfigError(
            f"cannot copy {_describe(source)} into {_describe(target)}: the formats differ; quantize again"
        )
    for name in target.inner_names:
        func(target.inner_tensors[name], source.inner_tensors[name], non_blocking)
    return target


def _is_pinned(func: Any, tensor: PackedTensor, **options: Any) -> bool:
    return all(func(value, **options) for value in tensor.inner_tensors.values())


def _same_format(one: PackedTensor, other: PackedTensor) -> bool:
    described = [(each.quant_type, each.shape, each.group_size, each.dtype) for each in (one, other)]
    return described[0] == described[1]


def _describe(tensor: Tensor) -> str:
    return repr(tensor) if isinstance(tensor, PackedTensor) else f"a tensor of shape {list(tensor.shape)}"


OPERATIONS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((aten.detach.default, aten.clone.default, aten._pin_memory.default), _on_inner),
    aten._to_copy.default: _to_copy,
    aten.copy_.default: _copy,
    aten.equal.default: _equal,
    aten.is_pinned.default: _is_pinned,
}


def _multiply_packed(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not isinstance(weight, PackedTensor):
        raise NotImplementedError("a packed weight can only be the weight of a linear layer; dequantize() it first")
    if torch.is_autocast_enabled(input.device.type):
        dtype = torch.get_autocast_dtype(input.device.type)
        input, bias = input.to(dtype), None if bias is None else bias.to(dtype)
    return _SlicedLinear.apply(input, weight, bias)


class _SlicedLinear(torch.autograd.Function):
    """x W^T + b, where W exists one slice of rows at a time."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: PackedTensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        output = input.new_empty(*input.shape[:-1], weight.shape[0])
        for rows, dense in weight.dense_slices(input.dtype):
            output[..., rows] = linear(input, dense, None if bias is None else bias[rows])
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        to_input = to_bias = None
        if ctx.needs_input_grad[0]:
            slices = ctx.weight.dense_slices(gradient.dtype)
            total = sum((gradient[..., rows] @ dense).float() for rows, dense in slices)
            to_input = torch.as_tensor(total).to(gradient.dtype)
        if ctx.needs_input_grad[2]:
            to_bias = gradient.reshape(-1, gradient.shape[-1]).sum(dim=0)
        return to_input, None, to_bias


torch.serialization.add_safe_globals([PackedTensor])
