"""Reject in-place changes of quantized weights: `weight += delta`, `weight.data.mul_(2)`, `weight.data = dense`.

Libraries handle such a change wrongly, each in its own way. quanto changes a dense copy and drops it, so that
`fuse_lora` has no effect; bitsandbytes changes the packed bytes, which corrupts the weight; torchao ignores
`.data = dense`. Their weight classes therefore get a check in front of `__torch_function__`, which every operation
passes. Replacing a parameter is allowed: PEFT merges a LoRA into weights of bitsandbytes and torchao by requantizing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from qexp.errors import ConfigError

OPERATORS = {
    f"__i{name}__" for name in
    ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "lshift", "rshift")
} | {"__setitem__"}  # fmt: skip
NO_CHANGE = ("requires_grad_", "share_memory_", "detach_", "rename_")  # leave the values unchanged
COPIES = ("copy_", "set_")
GET_DATA: Any = Tensor.data.__get__  # type: ignore[attr-defined]
STORED_DTYPE: Any = Tensor.dtype.__get__  # type: ignore[attr-defined]  # whatever a subclass shows
SET_DATA: Any = Tensor.data.__set__  # type: ignore[attr-defined]


@cache
def refuse_in_place(kind: Any) -> None:
    """Make in-place operations on quantized weights of a Tensor subclass raise ConfigError."""
    if kind in (Tensor, nn.Parameter) or hasattr(kind, "refuses_in_place"):
        return
    own = kind.__torch_function__
    call = getattr(own, "__func__", None)  # of a class method; None for the function that turns it off

    def __torch_function__(
        cls: Any, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        check_not_in_place(func, args, kwargs)
        result = own(func, types, args, kwargs or {}) if call is None else call(cls, func, types, args, kwargs or {})
        if func == GET_DATA and type(result) is Tensor and _is_quantized(args[0]):
            return result.as_subclass(PackedBytes)
        return result

    kind.__torch_function__ = classmethod(__torch_function__)


def check_not_in_place(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> None:
    """Raise ConfigError for an operation that would change a quantized weight in place."""
    name = getattr(func, "__name__", "")
    if name in NO_CHANGE:
        return
    if func == SET_DATA:
        if _is_quantized(args[0]) and _is_dense(args[1], args[0]):
            raise _in_place_error(name, args[0])
    elif name in COPIES:
        if len(args) > 1 and _is_quantized(args[0]) and not _has_same_format(args[0], args[1]):
            raise _in_place_error(name, args[0])
    elif name in OPERATORS or (name.endswith("_") and not name.endswith("__")):
        for target in _tensors_among(args[:1] or [(kwargs or {}).get("tensor")]):
            if _is_quantized(target) and not _is_transformers_initializing():
                raise _in_place_error(name, target)
    for target in _tensors_among([kwargs.get("out")] if kwargs else ()):
        if _is_quantized(target):
            raise _in_place_error(name, target)


def call_unless_in_place(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> Any:
    """Call an operation on a Tensor subclass. Raises ConfigError as `check_not_in_place`."""
    check_not_in_place(func, args, kwargs)
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **(kwargs or {}))


class PackedBytes(Tensor):
    """The packed bytes of a weight, read-only; results of operations on them are ordinary tensors."""

    refuses_in_place = True

    def __reduce_ex__(self, protocol: Any) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            return memo.setdefault(id(self), self.as_subclass(Tensor).clone())

    def detach(self) -> Tensor:
        """Return a tensor of the same class, as `nn.Parameter` requires."""
        return super().detach().as_subclass(PackedBytes)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return call_unless_in_place(func, args, kwargs)


def _tensors_among(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        parts = value if isinstance(value, (list, tuple)) else [value]
        yield from (part for part in parts if isinstance(part, Tensor))


def _is_quantized(value: Any) -> bool:
    """Return whether a tensor holds a quantized weight; those of bitsandbytes are dense before quantization."""
    if isinstance(value, PackedBytes) or is_traceable_wrapper_subclass(value):
        return True
    if type(value) in (Tensor, nn.Parameter) or not isinstance(value, Tensor):
        return False
    with torch._C.DisableTorchFunctionSubclass():
        if not getattr(value, "bnb_quantized", True):  # PEFT gives a dense weight the state of the one that it replaces
            return False
        return getattr(value, "quant_state", None) is not None or not value.is_floating_point()


def _is_transformers_initializing() -> bool:
    """Whether transformers loads a model of its own: it then initializes weights of quanto that it has just loaded too,
    which changes a dense copy of each. The class is ours and theirs, so that a load of theirs has to pass."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "initialize_weights" and frame.f_globals["__name__"].startswith("transformers."):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _is_dense(value: Tensor, weight: Any) -> bool:
    """Return whether a value is dense, and not packed bytes, which libraries may assign."""
    if is_traceable_wrapper_subclass(weight):
        return not is_traceable_wrapper_subclass(value)
    state = getattr(weight, "quant_state", None)
    return value.is_floating_point() if state is None else value.shape == state.shape


def _has_same_format(target: Any, source: Any) -> bool:
    """Return whether packed bytes replace packed bytes, as in load_state_dict."""
    if is_traceable_wrapper_subclass(target):
        return isinstance(source, Tensor) and is_traceable_wrapper_subclass(source)
    if not isinstance(source, Tensor):
        return False
    with torch._C.DisableTorchFunctionSubclass():
        return STORED_DTYPE(source) == STORED_DTYPE(target) and source.shape == target.shape


def _in_place_error(name: str, weight: Tensor) -> ConfigError:
    what = ".data = …" if name == "__set__" else name
    return ConfigError(
        f"{what} on a quantized weight ({type(weight).__name__}) is not possible: it cannot be changed in place. Keep "
        "a LoRA unfused; to change the weights, call model.dequantize() first, or change the dense checkpoint"
    )
