"""A quantized model: what it carries for other libraries and for saving, and how it is kept from being cast.

It carries, under upstream's names, `hf_quantizer`, `quantization_method`, `is_quantized`, `_pre_quantization_dtype`,
and for models of diffusers and transformers `quantization_config` in their own config (`interop/interfaces.py`).
`checkpoint_config` is the parsed config.json of the checkpoint, for the config.json to be saved; `checkpoint_path` is
where it is, which is no place to save to.

`Module.to(dtype)`, `.half()` and their like would cast the packed bytes of some formats and the scales of others, and
say nothing. `Module.to(device)` and `copy.deepcopy` lose parts of some: the scales that LLM.int8 keeps beside its
weight after the first forward, the layout of a frozen quanto weight. A guarded model refuses the former and does the
latter on the plain tensors in which the bytes lie, whatever the format.

The guard is a class put before the model's own (`model.__class__` becomes a subclass of the same name), so that a model
refers to nothing that refers to it, and is freed when it is let go. `unguard` puts the model's own class back.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from qexp.errors import ConfigError
from qexp.interop.interfaces import interface_of
from qexp.loading.component import Prepared
from qexp.loading.file_layout import read_layout
from qexp.loading.straight_through import give_backward
from qexp.offloading.engine import HOOK_MARK
from qexp.offloading.payload import Site, converted, is_plain, module_nbytes, sites
from qexp.quantizers.base import Quantizer

MARKS = ("hf_quantizer", "quantization_method", "_pre_quantization_dtype")
CLASSES = "_qexp_parameter_classes"  # entry of a pickled model's state
PROBES = (torch.float32, torch.float16)  # any cast changes one of them


class Guarded(nn.Module):
    """The guard, as a class in front of a model's own. What it does not define is the model's."""

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Move to a device. Raises: ConfigError for a dtype, or a tensor, which has one."""
        if torch._C._nn._parse_to(*args, **kwargs)[1] is not None:
            raise _cast_error(self, ".to(dtype)")
        return super().to(*args, **kwargs)

    def cuda(self, device: int | torch.device | None = None) -> Any:
        return self.to(torch.device("cuda", device) if isinstance(device, int) else torch.device(device or "cuda"))

    def half(self) -> Any:
        raise _cast_error(self, ".half()")

    def float(self) -> Any:
        raise _cast_error(self, ".float()")

    def double(self) -> Any:
        raise _cast_error(self, ".double()")

    def bfloat16(self) -> Any:
        raise _cast_error(self, ".bfloat16()")

    def type(self, dst_type: torch.dtype | str) -> Any:
        raise _cast_error(self, ".type(dtype)")

    def dequantize(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Put ordinary linear layers back, in place, in the dtype the weights were quantized from, or in `dtype`.

        What says that the model is quantized goes, this guard included: it can be cast, trained and saved like any
        other. An offloaded model is offloaded again. Raises: ConfigError if hooks of accelerate hold its weights.
        """
        quantizer = registered_quantizer(self)
        assert quantizer is not None  # what is guarded is registered
        return quantizer.dequantize(self, dtype)

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Return bytes that the model's weights really occupy, inner tensors and scales included."""
        if return_buffers:
            return module_nbytes(self)
        buffers = nn.ParameterList(nn.Parameter(buffer, requires_grad=False) for buffer in self.buffers())
        return module_nbytes(self) - module_nbytes(buffers)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Guard `_apply`, which `to`, `half`, `float` and the `to` of a module that holds this one all call."""
        if any(fn(torch.empty(0, dtype=dtype)).dtype != dtype for dtype in PROBES):
            raise _cast_error(self, "a cast")
        _refuse_offloaded(self, "moved")
        apart = _special_sites(self)
        before = [store[name] for store, name in apart]
        after = converted(before, fn)
        for store, name in apart:
            store[name] = None
        try:
            super()._apply(fn, recurse)
        except BaseException:
            after = before
            raise
        finally:
            for (store, name), value in zip(apart, after, strict=True):
                store[name] = value
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        _refuse_offloaded(self, "copied")
        values = [store[name] for store, name in _special_sites(self)]
        memo.update({id(value): twin for value, twin in zip(values, converted(values, Tensor.clone), strict=True)})
        if hasattr(super(), "__deepcopy__"):
            return super().__deepcopy__(memo)  # type: ignore[misc]  # a model's class may have one
        twin = _new(_own_class(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(super().__reduce_ex__(4)[2], memo))
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled as its own class and the guard, since nobody could look the class of both up by its name.

        torch pickles a parameter of bitsandbytes' classes as an ordinary one with attributes: the classes go along.
        """
        reduced: Any = super().__reduce_ex__(protocol)
        _, _, state, *rest = reduced
        classes = {
            name: type(parameter)
            for name, parameter in self.named_parameters(remove_duplicate=False)
            if not is_plain(parameter) and not is_traceable_wrapper_subclass(parameter)
        }
        return (_new, (_own_class(self),), {**state, CLASSES: classes}, *rest)

    def __setstate__(self, state: dict[str, Any]) -> None:
        classes = state.pop(CLASSES, {})
        super().__setstate__(state)
        for name, kind in classes.items():
            self.get_parameter(name).__class__ = kind


def guard(model: nn.Module) -> None:
    if not isinstance(model, Guarded):
        model.__class__ = _guarded_class(type(model))  # type: ignore[arg-type]  # mypy: classes are not hashable


def unguard(model: nn.Module) -> None:
    if isinstance(model, Guarded):
        model.__class__ = _own_class(model)


@cache
def _guarded_class(own: Any) -> Any:
    names = {name: getattr(own, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(own)(own.__name__, (Guarded, own), names)


def _own_class(model: nn.Module) -> Any:
    return type(model).__bases__[1]


def _new(own: Any) -> Any:
    kind = _guarded_class(own)
    return kind.__new__(kind)


def _special_sites(model: nn.Module) -> list[Site]:
    """Return the places where the model keeps values beyond their own bytes."""
    return [(store, name) for part in model.modules() for store, name in sites(part) if not is_plain(store[name])]


def _refuse_offloaded(model: nn.Module, what: str) -> None:
    if any(hasattr(module, HOOK_MARK) for module in model.modules()):
        raise ConfigError(
            f"an offloaded model cannot be {what}: its weights travel to the compute device by themselves; "
            "call qexp.remove_offload(model) first"
        )


def _cast_error(model: Any, what: str) -> ConfigError:
    dtype = str(model._pre_quantization_dtype).removeprefix("torch.")
    return ConfigError(
        f"{what} on a model quantized with {model.quantization_method}: its weights cannot be cast. It computes in "
        f"{dtype}; load it with another compute_dtype (model.to(device) moves it), or call model.dequantize() first"
    )


def register(model: nn.Module, prepared: Prepared) -> None:
    """Stage 9: mark a model that was just loaded."""
    marked, quantizer = cast(Any, model), prepared.quantizer
    source, checkpoint = prepared.request.source, prepared.request.checkpoint
    marked.checkpoint_path, marked.carried_files = checkpoint.path.absolute(), source.carried_files()
    marked.file_layout = read_layout(checkpoint, prepared.named)
    marked.checkpoint_config = {
        name: value for name, value in checkpoint.config.items() if name != "quantization_config"
    }
    if quantizer.quantization_method == "none":
        return
    marked._pre_quantization_dtype = prepared.compute_dtype
    marked.quantization_method = quantizer.quantization_method
    marked.is_quantized = True
    for name, value in quantizer.model_attributes.items():
        setattr(model, name, value)
    interface = interface_of(model)
    quantizer.unregister = _unregister
    marked.hf_quantizer = quantizer if interface is None else interface.attach(model, quantizer)
    if not quantizer.has_backward:
        give_backward(model, quantizer)
    guard(model)


def registered_quantizer(model: nn.Module) -> Quantizer | None:
    """Return the quantizer of a model that was loaded quantized, and was not dequantized since."""
    found = getattr(model, "hf_quantizer", None)
    found = getattr(found, "quantizer", found)  # from behind the interface for its class
    return found if isinstance(found, Quantizer) else None


def _unregister(model: nn.Module, quantizer: Quantizer) -> None:
    unguard(model)
    for name in (*MARKS, *quantizer.model_attributes):
        vars(model).pop(name, None)
    vars(model)["is_quantized"] = False
    interface = interface_of(model)
    if interface is not None:
        interface.detach(model)
