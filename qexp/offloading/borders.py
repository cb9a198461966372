"""Running a model whose modules compute on different devices: activations travel to where they are needed.

A border is a module all of whose weights compute on one device, called by code that belongs to several. Its inputs
travel to that device, its output stays there: the next block is mostly on the same one. The model itself takes inputs
from any device and answers on the device of the first of them.

The code of a module that has parts on several devices meets tensors of all of them: activations that stayed where they
were made, and its own parameters and buffers, which a plan puts wherever there was room. Each operation of such code
brings its operands to one device first: that of the tensor it changes in place, else of the first activation. Inside
borders nothing of this is active.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from qexp.offloading.grouping import is_called
from qexp.offloading.payload import flatten

Forward = Callable[..., Any]

TAKES_ANY = {Tensor.to, Tensor.copy_, Tensor.__setitem__, Tensor.set_}  # operations meant for several devices


class Borders:
    """The hooks of one model, until `remove()`."""

    def __init__(self, model: nn.Module, device_of: Callable[[str], torch.device], main: torch.device) -> None:
        """device_of: full name of a parameter or buffer -> where it computes; main: where the model's inputs go."""
        self._device_of, self._main = device_of, main
        self._crossed: list[tuple[nn.Module, Any]] = []  # (module, the forward that it had of its own, if any)
        self._alignment = Alignment()
        self._visit("", model)
        self._replace_forward(model, self._as_outermost)

    def remove(self) -> None:
        for module, before in reversed(self._crossed):
            if before is None:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = before
        self._crossed = []

    def _visit(self, name: str, module: nn.Module) -> set[torch.device]:
        """Put the borders of a module and its children; return the devices that it computes on."""
        prefix = f"{name}." if name else ""
        tensors = {**module._parameters, **module._buffers}
        devices = {self._device_of(prefix + own) for own, tensor in tensors.items() if tensor is not None}
        below = [(child, self._visit(prefix + part, child)) for part, child in module.named_children()]
        devices = devices.union(*(found for _, found in below))
        if len(devices) > 1:
            for child, found in below:
                if len(found) == 1:
                    self._put_border(child, *found)
            if is_called(module):
                self._alignment.owners.append(module)
                self._replace_forward(module, self._alignment.active())
        elif not name:
            self._put_border(module, *(devices or {self._main}))
        return devices

    def _put_border(self, module: nn.Module, device: torch.device) -> None:
        if is_called(module):
            self._replace_forward(module, lambda forward: self._as_border(forward, device))
            return
        for child in module.children():
            self._put_border(child, device)

    def _replace_forward(self, module: nn.Module, make: Callable[[Forward], Forward]) -> None:
        inner = module.forward
        self._crossed.append((module, vars(module).get("forward")))
        module.forward = wraps(inner)(make(inner))

    def _as_border(self, forward: Forward, device: torch.device) -> Forward:
        def run(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = travel((args, kwargs), device)
            with self._alignment.suspended(), _current(device):
                return forward(*args, **kwargs)

        return run

    def _as_outermost(self, forward: Forward) -> Forward:
        def run(*args: Any, **kwargs: Any) -> Any:
            home = next((tensor.device for tensor in _tensors_in((args, kwargs))), self._main)
            args, kwargs = travel((args, kwargs), self._main)
            return travel(forward(*args, **kwargs), home)

        return run


class Alignment(TorchFunctionMode):
    """While it is active, every operation finds its operands on one device."""

    def __init__(self) -> None:
        super().__init__()
        self.owners: list[nn.Module] = []  # modules whose own tensors follow the activations
        self._is_active = False

    @contextmanager
    def active(self) -> Iterator[None]:
        if self._is_active:  # a divided module in a divided module
            yield
            return
        self._is_active = True
        try:
            with self:
                yield
        finally:
            self._is_active = False

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Suspend the mode; it is taken off the stack unless another mode is above it."""
        before, on_top = self._is_active, self._is_active and _get_current_function_mode() is self
        self._is_active = False
        if on_top:
            self.__exit__(None, None, None)
        try:
            yield
        finally:
            if on_top:
                self.__enter__()
            self._is_active = before

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._is_active and func not in TAKES_ANY:
            tensors = list(_tensors_in((args, kwargs)))
            if len({tensor.device for tensor in tensors if tensor.dim() or tensor.device.type != "cpu"}) > 1:
                args, kwargs = travel((args, kwargs), self._target(func, tensors, kwargs))
        return func(*args, **kwargs)

    def _target(self, func: Any, tensors: list[Tensor], kwargs: Mapping[str, Any]) -> torch.device:
        name = func.__name__
        changes_first = name.endswith("_") and (not name.startswith("__") or name.startswith("__i"))
        changed = list(_tensors_in(kwargs.get("out"))) or tensors[:1] * changes_first
        own = {id(tensor) for one in self.owners for tensor in (*one._parameters.values(), *one._buffers.values())}
        activations = [tensor for tensor in tensors if id(tensor) not in own and not isinstance(tensor, nn.Parameter)]
        return [*changed, *activations, *tensors][0].device


def travel(value: Any, device: torch.device) -> Any:
    """Return a value with all of its tensors on a device; the same object if they are there already."""
    if isinstance(value, Tensor):
        return value if value.device == device else _move_tensor(value, device)
    if isinstance(value, list | tuple):
        parts = [travel(part, device) for part in value]
        if all(new is old for new, old in zip(parts, value, strict=True)):
            return value
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, Mapping):
        named = {key: travel(part, device) for key, part in value.items()}
        return value if all(named[key] is value[key] for key in named) else type(value)(named)  # type: ignore[call-arg]
    return value


def _move_tensor(tensor: Tensor, device: torch.device) -> Any:
    """Through its leaves: `.to()` of some quantized tensors loses parts."""
    if type(tensor) in (Tensor, nn.Parameter):
        return tensor.to(device)
    parts, rebuild = flatten([tensor])
    return rebuild([part.to(device) for part in parts])[0]


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors_in(part)
    elif isinstance(value, Mapping):
        yield from _tensors_in(list(value.values()))


def _current(device: torch.device) -> Any:
    """Make an accelerator the current one: some kernels are launched there, whatever device their tensors are on."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)
