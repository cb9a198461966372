"""A linear weight that is stored as GGUF blocks and decoded on use.

`GGUFTensor` looks like the dense weight [out, in] in the dtype that the model computes in, and holds nothing but `raw`,
uint8 [out, bytes of a row], with the name of its type. An ordinary `nn.Linear` computes with it: `linear` decodes a
few rows at a time, multiplies, and drops them, so that the dense weight never exists, in training neither (only the
input and the bias get gradients; the backward pass decodes again). Copies, moves between devices, pickles and state
dicts carry the blocks. `.to(dtype)` changes what the blocks are decoded to, and not one byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qexp.checkpoints.gguf_types import TYPES
from qexp.quantizers.gguf_blocks.decode import decode
from qexp.quantizers.in_place import call_unless_in_place

CHUNK_WEIGHTS = {"cpu": 1 << 22, "cuda": 1 << 26}  # dense at a time; smaller chunks make slower matrix products


class GGUFTensor(Tensor):
    """raw: uint8 [out, bytes of a row]; dtype: reported; compute_dtype: of the products, if different."""

    raw: Tensor
    quant_type: str
    compute_dtype: torch.dtype | None
    refuses_in_place = True

    @staticmethod
    def __new__(
        cls,
        raw: Tensor,
        quant_type: str = "",
        dtype: torch.dtype | None = None,
        compute_dtype: torch.dtype | None = None,
        requires_grad: bool = False,
    ) -> GGUFTensor:
        """Accept a GGUFTensor as raw, too: accelerate's hooks call a parameter's class with its new value."""
        if isinstance(raw, GGUFTensor):
            return torch.nn.Parameter(raw.detach(), requires_grad)  # type: ignore[return-value]
        kind = TYPES[quant_type]
        assert raw.dtype == torch.uint8 and raw.dim() == 2 and raw.shape[1] % kind.block_bytes == 0, raw.shape
        shape = (raw.shape[0], raw.shape[1] // kind.block_bytes * kind.block)
        weight: GGUFTensor = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=raw.device)
        weight.raw, weight.quant_type, weight.compute_dtype = raw, quant_type, compute_dtype
        return weight

    def __init__(self, *arguments: object, **named: object) -> None:  # all is done above
        super().__init__()

    def around(self, raw: Tensor, dtype: torch.dtype | None = None) -> GGUFTensor:
        """Return the same kind of weight with other bytes."""
        return GGUFTensor(raw, self.quant_type, dtype or self.dtype, self.compute_dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the dense weight [out, in]."""
        return self.decoded_rows(0, self.shape[0], dtype or self.dtype)

    def decoded_rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        out = torch.empty(stop - start, self.shape[1], dtype=dtype, device=self.device)
        decode(self.quant_type, self.raw[start:stop], out)
        return out

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        context = {"quant_type": self.quant_type, "dtype": self.dtype, "compute_dtype": self.compute_dtype}
        return ["raw"], context

    @classmethod
    def __tensor_unflatten__(
        cls, inner: Mapping[str, Tensor], context: Mapping[str, Any], size: object, stride: object
    ) -> GGUFTensor:
        return cls(inner["raw"], **context)

    def __repr__(self) -> str:  # type: ignore[override]
        shape = "x".join(map(str, self.shape))
        return f"GGUFTensor({self.quant_type}, {shape}, {self.dtype}, device={self.device})"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is functional.linear:
            return _multiply_blocks(*args, **(kwargs or {}))
        return call_unless_in_place(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func not in OPERATIONS:
            raise NotImplementedError(
                f"{func} is not defined for a weight in GGUF blocks, only linear layers are; use weight.dequantize()"
            )
        return OPERATIONS[func](*args, **(kwargs or {}))


def _multiply_blocks(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply input [..., in] -> [..., out] in the weight's compute dtype; return the input's dtype."""
    if not isinstance(weight, GGUFTensor):
        raise NotImplementedError("a weight in GGUF blocks can only be the weight of a linear layer")
    if torch.is_grad_enabled() and (input.requires_grad or (bias is not None and bias.requires_grad)):
        return _Linear.apply(input, weight, bias)
    return _multiply(input, weight, bias)


def _decode_slices(weight: GGUFTensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, dense weights of these rows), a bounded number of weights at a time."""
    rows, columns = weight.shape
    step = max(CHUNK_WEIGHTS.get(weight.device.type, 1 << 22) // max(columns, 1), 1)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        yield slice(start, stop), weight.decoded_rows(start, stop, dtype)


def _multiply(input: Tensor, weight: GGUFTensor, bias: Tensor | None) -> Tensor:
    dtype = weight.compute_dtype or weight.dtype
    x, b = input.to(dtype), None if bias is None else bias.to(dtype)
    out = input.new_empty(*input.shape[:-1], weight.shape[0])
    for rows, dense in _decode_slices(weight, dtype):
        part = functional.linear(x, dense, None if b is None else b[rows])
        if rows.stop - rows.start == weight.shape[0]:
            return part.to(input.dtype)
        out[..., rows] = part
    return out


class _Linear(torch.autograd.Function):
    """Saves the blocks for the backward pass, where autograd would save the dense weight."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: GGUFTensor, bias: Tensor | None) -> Tensor:
        ctx.weight, ctx.bias_dtype = weight, None if bias is None else bias.dtype
        return _multiply(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        (gradient,), weight, for_input, for_bias = gradients, ctx.weight, None, None
        if ctx.needs_input_grad[0]:
            dtype = weight.compute_dtype or weight.dtype
            total = torch.zeros(*gradient.shape[:-1], weight.shape[1], dtype=dtype, device=gradient.device)
            for rows, dense in _decode_slices(weight, dtype):
                total += gradient[..., rows].to(dtype) @ dense
            for_input = total.to(gradient.dtype)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
            for_bias = gradient.flatten(0, -2).sum(dim=0).to(ctx.bias_dtype)
        return for_input, None, for_bias


def _copy_(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if not (isinstance(target, GGUFTensor) and isinstance(source, GGUFTensor)):
        raise NotImplementedError("weights in GGUF blocks and dense ones are not copied into each other")
    if (target.quant_type, target.shape) != (source.quant_type, source.shape):
        raise ValueError(f"{source!r} does not fit into {target!r}: types and shapes must be equal")
    target.raw.copy_(source.raw, non_blocking)
    return target


def _on_raw(operation: Any) -> Callable[..., GGUFTensor]:
    def apply(weight: GGUFTensor, **options: Any) -> GGUFTensor:
        kept = {name: value for name, value in options.items() if name not in ("dtype", "layout", "memory_format")}
        return weight.around(operation(weight.raw, **kept), options.get("dtype"))

    return apply


_aten = torch.ops.aten
OPERATIONS: dict[Any, Callable[..., Any]] = {
    **{
        kind.default: _on_raw(kind.default)
        for kind in (_aten.detach, _aten.alias, _aten.clone, _aten.empty_like, _aten._pin_memory, _aten._to_copy)
    },
    _aten.copy_.default: _copy_,
    _aten.is_pinned.default: lambda weight, device=None: weight.raw.is_pinned(),
}
torch.serialization.add_safe_globals([GGUFTensor])
