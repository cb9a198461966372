"""Any tensor as the plain tensors that hold its bytes, and back: nothing else in this package looks at tensor types.

Three kinds of value carry weights in a module:

* wrapper subclasses (torchao, quanto): `__tensor_flatten__` names the inner tensors, which may be wrappers again;
* data + attributes (bitsandbytes `Params4bit` and `Int8Params`, GGUF parameters, plain tensors and parameters):
  the tensor's own bytes, and whatever tensors hang in its `__dict__`, directly or inside a `QuantState`;
* state objects of bitsandbytes modules (`Linear8bitLt.state`, `Linear4bit.quant_state`), which hold tensors.

`flatten` takes a list of such values apart and returns a recipe that builds equal values around other leaves. The
recipe keeps metadata only: were it to hold one tensor of the original, that tensor's memory would never be freed.
Values that are one object stay one object (tied parameters; a quant state that the weight and its module share).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

STATE_LIBRARY = "bitsandbytes"  # the library that keeps weight bytes in objects that are no tensors

Build = Callable[[Sequence[Tensor], dict[int, Any]], Any]  # (leaves, what was built already) -> value
Rebuild = Callable[[Sequence[Tensor]], list[Any]]
Site = tuple[MutableMapping[str, Any], str]  # where a module keeps a value: store[name]


def is_state(value: object) -> bool:
    """Return whether a value is one of the objects, not tensors or modules, in which a library keeps weight bytes."""
    library = type(value).__module__.partition(".")[0]
    return library == STATE_LIBRARY and hasattr(value, "__dict__") and not isinstance(value, (Tensor, nn.Module, type))


def sites(module: nn.Module) -> list[Site]:
    """Return the places where this module (without its children) keeps values that hold weight bytes."""
    found: list[Site] = []
    for store in (module._parameters, module._buffers):
        found += [(store, name) for name, value in store.items() if value is not None]
    return found + [(vars(module), name) for name, value in vars(module).items() if is_state(value)]


def holders(value: object) -> Iterator[Tensor]:
    """Yield the tensor objects in whose storage a value's bytes are, in a fixed order, repetitions included."""
    if isinstance(value, Tensor) and is_traceable_wrapper_subclass(value):
        for name in value.__tensor_flatten__()[0]:
            yield from holders(getattr(value, name))
    elif isinstance(value, Tensor) or is_state(value):
        if isinstance(value, Tensor):
            yield value
        for attribute in vars(value).values():
            yield from holders(attribute)


def is_plain(value: object) -> bool:
    """Return whether a value is a tensor whose own bytes are all it is."""
    return type(value) in (Tensor, nn.Parameter)


def leaves(value: object) -> list[Tensor]:
    """Return the plain tensors that hold a value's bytes: itself, or its true inner tensors."""
    return _Flattening(value).leaves


def true_nbytes(*values: object) -> int:
    """Return bytes that the values occupy: inner tensors and scales counted, memory that they share counted once."""
    return nbytes_of(leaf for value in values for leaf in leaves(value))


def nbytes_of(parts: Iterable[Tensor]) -> int:
    """Return bytes that leaves occupy, memory that they share counted once."""
    return sum(span for _, _, span in {(leaf.device, leaf.data_ptr(), span_bytes(leaf)) for leaf in parts})


def module_nbytes(module: nn.Module) -> int:
    """`true_nbytes` of all parameters, buffers and states of a module and the modules below it."""
    return true_nbytes(*(store[name] for child in module.modules() for store, name in sites(child)))


def span_bytes(leaf: Tensor) -> int:
    """Return bytes from a strided tensor's first element to the end of its last one."""
    if leaf.numel() == 0:
        return 0
    reach = sum((size - 1) * stride for size, stride in zip(leaf.shape, leaf.stride(), strict=True))
    return (reach + 1) * leaf.element_size()


def as_bytes(leaf: Tensor) -> Tensor:
    """Return the memory of a strided tensor as uint8 [span_bytes], gaps between its elements included."""
    if leaf.numel() == 0:
        return torch.empty(0, dtype=torch.uint8, device=leaf.device)
    return leaf.as_strided((span_bytes(leaf) // leaf.element_size(),), (1,)).view(torch.uint8)


def flatten(values: Iterable[object]) -> tuple[list[Tensor], Rebuild]:
    """Take values apart into their leaves, and a recipe that builds equal values around leaves of the same layout."""
    flattening = _Flattening(*values)
    builds = flattening.builds

    def rebuild(other_leaves: Sequence[Tensor]) -> list[Any]:
        built: dict[int, Any] = {}
        return [build(other_leaves, built) for build in builds]

    return flattening.leaves, rebuild


def converted(values: Iterable[object], convert: Callable[[Tensor], Tensor]) -> list[Any]:
    """Equal values around converted leaves; what is one object or one piece of memory stays so."""
    parts, rebuild = flatten(values)
    results: dict[Any, Tensor] = {}
    for part in parts:
        key = identity(part)
        results[key] = results[key] if key in results else convert(part)
    return rebuild([results[identity(part)] for part in parts])


def identity(leaf: Tensor) -> Any:
    """Return a key for a piece of memory and how it is looked at."""
    return leaf.device, leaf.data_ptr(), tuple(leaf.shape), leaf.stride(), leaf.dtype


class _Flattening:
    """One pass over values. `leaves` are listed in the order in which the builds expect them."""

    def __init__(self, *values: object) -> None:
        self.leaves: list[Tensor] = []
        self._known: dict[int, Build] = {}
        self._visited: list[object] = []  # keeps the ids in _known from being reused during the pass
        with torch._C.DisableTorchFunctionSubclass():
            self.builds = [self._visit(value) for value in values]

    def _visit(self, value: object) -> Build:
        if id(value) not in self._known:
            number = len(self._visited)
            self._visited.append(value)
            self._known[id(value)] = _once(number, self._take_apart(value))
        return self._known[id(value)]

    def _take_apart(self, value: object) -> Build:
        if not isinstance(value, Tensor):
            return _build_state(type(value), *self._attributes(value))
        if is_traceable_wrapper_subclass(value):
            names, context = value.__tensor_flatten__()
            inner = {name: self._visit(getattr(value, name)) for name in names}
            return _build_wrapper(value, inner, context)
        number = len(self.leaves)
        self.leaves.append(value.detach().as_subclass(Tensor))
        return _build_plain(type(value), number, value.requires_grad, *self._attributes(value))

    def _attributes(self, value: object) -> tuple[dict[str, Any], dict[str, Build]]:
        """Return the `__dict__` of a value, split into what is copied as it is and what has bytes of its own."""
        plain, nested = {}, {}
        for name, attribute in vars(value).items():
            if isinstance(attribute, Tensor) or is_state(attribute):
                nested[name] = self._visit(attribute)
            else:
                plain[name] = attribute
        return plain, nested


# The builds below are functions of their own so that they close over metadata and never over the original tensor.


def _once(number: int, build: Build) -> Build:
    def build_once(leaves: Sequence[Tensor], built: dict[int, Any]) -> Any:
        if number not in built:
            built[number] = build(leaves, built)
        return built[number]

    return build_once


def _build_plain(
    kind: type[Tensor], number: int, requires_grad: bool, plain: dict[str, Any], nested: dict[str, Build]
) -> Build:
    def build(leaves: Sequence[Tensor], built: dict[int, Any]) -> Tensor:
        tensor = torch.Tensor._make_subclass(kind, leaves[number], requires_grad)
        vars(tensor).update(plain)
        vars(tensor).update({name: part(leaves, built) for name, part in nested.items()})
        return tensor

    return build


def _build_wrapper(value: Any, inner: dict[str, Build], context: Any) -> Build:
    kind, size, stride = type(value), value.size(), value.stride()
    is_parameter, requires_grad = isinstance(value, nn.Parameter), value.requires_grad

    def build(leaves: Sequence[Tensor], built: dict[int, Any]) -> Tensor:
        parts = {name: part(leaves, built) for name, part in inner.items()}
        tensor: Tensor = kind.__tensor_unflatten__(parts, context, size, stride)
        return nn.Parameter(tensor, requires_grad) if is_parameter else tensor.requires_grad_(requires_grad)

    return build


def _build_state(kind: type, plain: dict[str, Any], nested: dict[str, Build]) -> Build:
    def build(leaves: Sequence[Tensor], built: dict[int, Any]) -> Any:
        state: Any = object.__new__(kind)
        vars(state).update(plain)
        vars(state).update({name: part(leaves, built) for name, part in nested.items()})
        return state

    return build
