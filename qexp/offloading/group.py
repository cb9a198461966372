"""A group: modules with weights that are copied together, and the layout of their bytes in one flat buffer.

Every leaf starts at a 256-byte boundary: a weight a few bytes off its alignment changes the last bits of a result.
Leaves that share memory (tied parameters, LLM.int8 weights, which are data and attribute at once) are stored once.
A binding is the values of one module built around one flat piece of memory. Building costs up to 130 µs for a
wrapper subclass, putting a built value in its place 0.35 µs: so bindings are built once and kept.

A binding also notices when a module has changed its own weights: bitsandbytes casts biases to the input's dtype and may
repack 4-bit weights on their first forward, and a buffer may be updated in place. The engine then stores what
the module made of them, so that the offloaded model goes on exactly as the resident one would.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qexp.errors import ConfigError
from qexp.offloading.payload import Rebuild, Site, as_bytes, flatten, holders, sites, span_bytes

ALIGNMENT = 256  # bytes, as cudaMalloc aligns: kernels load several numbers at once


class Rest(Protocol):
    """Where a group's bytes are while it does not run. `flat` is host memory, or a mapping of the file."""

    flat: Tensor
    in_memory: bool  # whether `flat` occupies memory, or only stands for bytes on disk

    def load_into(self, target: Tensor, staging: Callable[[int], Tensor], *, non_blocking: bool) -> None: ...
    def expect(self) -> None: ...  # it will be loaded soon
    def close(self) -> None: ...


Pieces = list[tuple[int, Tensor]]  # (offset, bytes), ascending
MakeRest = Callable[[str, int, Pieces], Rest]


@dataclass(frozen=True)
class Place:
    """Where a leaf is in the flat memory, and how it looks."""

    offset: int
    nbytes: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    origin: torch.device  # the device that the leaf was on before

    def view(self, flat: Tensor) -> Tensor:
        """Return a view of the leaf in a flat buffer, with its own version counter to detect writes."""
        if self.nbytes == 0:
            return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=flat.device)
        piece = flat[self.offset : self.offset + self.nbytes].view(self.dtype)
        return piece.as_strided(self.shape, self.stride).data


def lay_out(name: str, leaves: Sequence[Tensor], origin: torch.device | None = None) -> tuple[list[Place], Pieces, int]:
    """Give each leaf its place: (places, the bytes to store, total bytes). origin: null for the device it is on."""
    offsets: dict[tuple[torch.device, int, int], int] = {}
    places, pieces, total = [], [], 0
    for leaf in leaves:
        if leaf.layout is not torch.strided or leaf.device.type == "meta":
            what = "is on the meta device" if leaf.device.type == "meta" else f"has layout {leaf.layout}"
            raise ConfigError(
                f"offload: a tensor of '{name}' {what}; only loaded, strided tensors can be offloaded: load the model "
                "first"
            )
        span = span_bytes(leaf)
        key = (leaf.device, leaf.data_ptr(), span)
        if span and key not in offsets:
            offsets[key] = total
            pieces.append((total, as_bytes(leaf)))
            total += -(-span // ALIGNMENT) * ALIGNMENT
        offset = offsets.get(key, 0)
        places.append(Place(offset, span, tuple(leaf.shape), leaf.stride(), leaf.dtype, origin or leaf.device))
    return places, pieces, total


class Binding:
    """The values of one module around one flat piece of memory, ready to be put in their places."""

    def __init__(self, entries: list[tuple[Site, Any]]) -> None:
        self.entries = entries
        with torch._C.DisableTorchFunctionSubclass():
            held = [tensor for _, value in entries for tensor in holders(value)]
            self.watched = [(tensor, tensor.data_ptr(), tensor._version) for tensor in held]

    def bind(self) -> None:
        for (store, name), value in self.entries:
            store[name] = value

    def is_bound(self) -> bool:
        return all(store.get(name) is value for (store, name), value in self.entries)

    def changed(self) -> bool:
        """Return whether a bound value was replaced, moved or written to."""
        with torch._C.DisableTorchFunctionSubclass():
            return not self.is_bound() or any(
                tensor.data_ptr() != address or tensor._version != version for tensor, address, version in self.watched
            )


Unit = tuple[nn.Module, Sequence[nn.Module]]  # a module whose forward needs weights, and the modules that own them


class Group:
    """Modules whose weights travel together: `pack` moves the bytes to where they rest, `restore` brings them back."""

    rest: Rest
    at_rest: list[Binding]  # one for each module

    def __init__(self, name: str, units: Sequence[Unit], origin: torch.device | None = None) -> None:
        """origin: the device to restore values to; null for the one that they are on."""
        self.name = name
        self.modules = [module for module, _ in units]
        self.sites = [[site for owner in owners for site in sites(owner)] for _, owners in units]
        self.nbytes = 0
        self.places: list[Place] = []
        self.packed = False
        self._origin = origin
        self._rebuild: Rebuild

    @property
    def all_sites(self) -> list[Site]:
        return [site for row in self.sites for site in row]

    def measure(self) -> int:
        """Return the bytes of the group's flat buffer, before it is packed."""
        return lay_out(self.name, flatten(store[name] for store, name in self.all_sites)[0])[2]

    def pack(self, make_rest: MakeRest) -> None:
        """Store the modules' current values, and replace them by views of the stored bytes."""
        leaves, self._rebuild = flatten(store[name] for store, name in self.all_sites)
        origin = self.places[0].origin if self.places else self._origin  # weights packed anew come from a slot
        self.places, pieces, self.nbytes = lay_out(self.name, leaves, origin)
        rest = make_rest(self.name, self.nbytes, pieces)
        if self.packed:
            self.rest.close()
        self.rest, self.packed = rest, True
        self.at_rest = self.bindings(rest.flat)
        for binding in self.at_rest:
            binding.bind()

    def bindings(self, flat: Tensor, *, frozen: bool = False) -> list[Binding]:
        """Return a binding per module, around a flat buffer that has (or will get) the group's bytes."""
        with torch.inference_mode(False), torch.no_grad():
            values = iter(self._rebuild([place.view(flat) for place in self.places]))
            entries = [[(site, next(values)) for site in row] for row in self.sites]
            if frozen:  # a slot is overwritten: nothing may remember its values for a backward pass
                for tensor in (value for row in entries for _, value in row if isinstance(value, Tensor)):
                    tensor.requires_grad_(False)
            return [Binding(row) for row in entries]

    def restore(self) -> list[tuple[Site, Any]]:
        """Return the values in separate memory again, each leaf on its original device."""
        copies: dict[tuple[int, int], Tensor] = {}
        leaves = []
        for place in self.places:
            key = (place.offset, place.nbytes)
            if key not in copies:
                copies[key] = torch.empty(place.nbytes, dtype=torch.uint8, device=place.origin)
                copies[key].copy_(self.rest.flat[place.offset : place.offset + place.nbytes])
            leaves.append(replace(place, offset=0).view(copies[key]))
        return list(zip(self.all_sites, self._rebuild(leaves), strict=True))

    def release(self) -> None:
        """Release the stored memory or file, and the bindings that refer to it."""
        self.rest.close()
        self.at_rest, self.packed = [], False
