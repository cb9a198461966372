"""The registration with torch: which operation does what on the fake device.

Views are those of the CPU, on the same storage. New memory is tagged host memory. Everything else is the fallback: the
CPU's kernel on the same bytes, after a check that all tensors are on one device. Operations that torch composes of
others arrive here as their parts.
"""

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from tests.fake_device import counters, memory, races
from tests.fake_device.copies import copy_from
from tests.fake_device.counters import one_at_a_time
from tests.fake_device.memory import is_on_device
from tests.fake_device.streams import DeviceModule, Stream, current_stream

KEY = "PrivateUse1"
VIEWS = ("as_strided", "view", "_reshape_alias", "unfold")
WITHOUT_NUMBERS = "aten::bitwise_"  # other operations take a number in the place of a tensor
KEPT_WHOLE = ("native_layer_norm", "native_group_norm")  # torch would compose them of others, with other last bits
SIZED_BY_CONTENT = ("nonzero", "masked_select", "_unique2", "unique_dim")  # the host has to wait for the size

_libraries: list[Any] = []  # a registration lasts as long as its library object


@cache
def install() -> None:
    """Register the device, for the rest of the process."""
    _setup_privateuseone_for_python_backend(memory.NAME, backend_module=DeviceModule())
    aten, every = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
    _libraries.extend([aten, every])
    for name in VIEWS:
        aten.impl(name, _view(getattr(torch.ops.aten, name).default), KEY)
    for name in KEPT_WHOLE:
        aten.impl(name, partial(run_on_host, getattr(torch.ops.aten, name).default), KEY)
    for name, operation in OPERATIONS.items():
        aten.impl(name, one_at_a_time(operation), KEY)
    for key in ("CPU", KEY):
        aten.impl("is_pinned", memory.is_pinned, key)
        aten.impl("_pin_memory", one_at_a_time(memory.pin), key)
    every.fallback(run_on_host, KEY)
    torch.Tensor.record_stream = lambda tensor, stream: races.record_stream(tensor, stream.number)  # type: ignore


def _view(operation: Any) -> Any:
    host_keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    return lambda *args, **kwargs: operation.redispatch(host_keys, *args, **kwargs)


def _allocate(tensor: Tensor, device: torch.device) -> Tensor:
    stream = current_stream(device)
    return memory.allocate(tensor, stream.index, stream.number, stream.clock)


def _empty(
    size: Any, *, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None, memory_format=None
) -> Tensor:
    return _uninitialized(
        torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format), device
    )


def _empty_strided(
    size: Any, stride: Any, *, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None
) -> Tensor:
    return _uninitialized(torch.empty_strided(size, stride, dtype=dtype), device)


def _uninitialized(tensor: Tensor, device: torch.device) -> Tensor:
    memory.poison(tensor)
    return _allocate(tensor, device)


def _item(tensor: Tensor) -> Any:
    current_stream(tensor.device).synchronize()
    return memory.as_host(tensor).item()


def _convolution(*args: Any) -> Any:
    return run_on_host(torch.ops.aten.convolution.default, *args)


OPERATIONS = {
    "empty.memory_format": _empty,
    "empty_strided": _empty_strided,
    "_copy_from": copy_from,
    "_copy_from_and_resize": copy_from,
    "_local_scalar_dense": _item,
    "convolution_overrideable": _convolution,
    "_fused_sdp_choice": lambda *_, **__: 0,  # attention as plain matrix products
}


class Kernel:
    """One run of one operation: its tensors on the host, and the results back on the device."""

    def __init__(self, operation: Any, device: torch.device) -> None:
        self.operation, self.device = operation, device
        self.stream: Stream = current_stream(device)
        self._given: list[tuple[Tensor, Tensor]] = []  # (on the host, on the device)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        host_args = [self.down(value) for value in args]
        host_kwargs = {name: self.down(value) for name, value in kwargs.items()}
        result = self.operation(*host_args, **host_kwargs)
        for host, device in self._given:
            if host.numel() and not device.numel():  # it was empty, and the kernel has given it a size
                device.data = self.new(host)
        return self.up(result)

    def down(self, value: Any) -> Any:
        if is_on_device(value):
            host = memory.as_host(value) if value.numel() else torch.empty_like(value, device="cpu")
            self._given.append((host, value))
            return host
        if isinstance(value, torch.device) and value.type == memory.NAME:
            return torch.device("cpu")
        return type(value)(self.down(item) for item in value) if isinstance(value, (list, tuple)) else value

    def up(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(self.up(item) for item in value)
        if not isinstance(value, Tensor):
            if value is not None:  # a number or a truth value, which the host has waited for
                self.stream.synchronize()
            return value
        for host, device in self._given:
            if value is host:
                return device
        if any(value.untyped_storage().data_ptr() == host.untyped_storage().data_ptr() for host, _ in self._given):
            return memory.as_device(value, self.stream.index)
        return self.new(value)

    def new(self, value: Tensor) -> Tensor:
        new = _allocate(value, self.device)
        races.access(new, self.stream.number, self.stream.clock, write=True, what=str(self.operation))
        return new


@one_at_a_time
def run_on_host(operation: Any, *args: Any, **kwargs: Any) -> Any:
    """The fallback for every operation that has no entry above."""
    used = list(_tensors([*args, *kwargs.values()]))
    devices = {tensor.device for tensor in used if is_on_device(tensor)}
    if len(devices) > 1 or any(tensor.dim() and not is_on_device(tensor) for tensor in used):
        places = ", ".join(str(tensor.device) for tensor in used)
        raise RuntimeError(f"Expected all tensors to be on the same device, but {operation} got {places}")
    if operation._schema.name.startswith(WITHOUT_NUMBERS):
        args = tuple(torch.tensor(value) if isinstance(value, int) else value for value in args)
    kernel = Kernel(operation, devices.pop() if devices else torch.device(kwargs.get("device") or memory.NAME))
    _check(operation, kernel.stream, args, kwargs)
    counters.total.kernels += 1
    kernel.stream.deliver(kernel.stream.submitted)
    if operation._schema.name.partition("::")[2] in SIZED_BY_CONTENT:
        kernel.stream.synchronize()
    return kernel.run(args, kwargs)


def _tensors(value: Any) -> Any:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


@cache
def _written(operation: Any) -> frozenset[str]:
    return frozenset(item.name for item in operation._schema.arguments if item.alias_info and item.alias_info.is_write)


def _check(operation: Any, stream: Stream, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    names = [item.name for item in operation._schema.arguments]
    races.launch(stream.number, stream.clock)
    for name, value in [*zip(names, args, strict=False), *kwargs.items()]:
        for tensor in _tensors(value):
            if is_on_device(tensor):
                write = name in _written(operation)
                races.access(tensor, stream.number, stream.clock, write=write, what=str(operation))
