"""A model placed over several devices: what rests where it computes stays there, the rest travels.

Every device that computes has an engine and a ring of its own (see engine.py); weights on the CPU or on disk travel
to it in groups: blocks that must not be split, and leaf modules. A group is packed as soon as its last weight is
loaded, so that the device, and for what goes to disk also the host, never hold more than a few of them. What belongs
directly to a module that has children has no forward that tells when it is needed: it stays on the device.

The ring has room for two groups, so that one travels while the other runs; where the device's limit leaves no room for
two blocks, leaf modules travel instead, and at last one at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from qexp.config.offload import OffloadConfig, has_streams
from qexp.errors import ConfigError
from qexp.offloading.borders import Borders
from qexp.offloading.engine import HOOK_MARK
from qexp.offloading.group import ALIGNMENT, Group, Unit
from qexp.offloading.grouping import units_of
from qexp.offloading.payload import Site, leaves, sites
from qexp.offloading.placement import Placement
from qexp.offloading.strategies import HANDLE, Offload
from qexp.system.memory import GIB

PADDING_BYTES = 8 * ALIGNMENT  # at most, of a tensor: its leaves start at boundaries


@dataclass(eq=False)
class Travelling:
    """A group to be: modules that compute on `device` and rest elsewhere. nbytes: about what it will take."""

    name: str
    units: list[Unit]
    to: str
    device: torch.device
    nbytes: int
    missing: int = 0  # weights that are not loaded yet
    packed: bool = False

    @property
    def owners(self) -> list[nn.Module]:
        return [owner for _, owners in self.units for owner in owners]


class Dispatch:
    """A model that runs over several devices: pack what travels, then start; `remove()` ends it."""

    def __init__(self, model: nn.Module, placement: Placement, no_split: Collection[str], store: Path | None) -> None:
        """model: loaded, or a skeleton whose tensors are reported to `loaded` one by one. store: the folder on disk.

        Raises: ConfigError where a device has no room for what travels to it, or a conflict; DiskError.
        """
        self.model, self.placement, self._no_split, self._store = model, placement, no_split, store
        self._borders: Borders | None = None
        self._offloads: dict[torch.device, Offload] = {}
        self._by_owner: dict[int, Travelling] = {}
        self._tensors = _tensor_names(model)
        self._plan()

    @property
    def device(self) -> torch.device:
        """The device of the model's inputs."""
        return self.placement.main

    def expect(self, names: Collection[str]) -> None:
        """Register the tensors that will be reported to `loaded`."""
        for name in names:
            group = self._group_of(name)
            if group is not None:
                group.missing += 1

    def loaded(self, name: str) -> None:
        """Report a loaded tensor. After the last one of a group, the group is moved to its storage."""
        group = self._group_of(name)
        if group is not None:
            group.missing -= 1
            if group.missing == 0:
                self._pack(group)

    def travels(self, module: nn.Module) -> bool:
        """Return whether the module's own tensors are stored on another device than they compute on."""
        return id(module) in self._by_owner

    def start(self) -> None:
        """Pack the remaining groups and attach the hooks."""
        for group in dict.fromkeys(self._by_owner.values()):
            self._pack(group)
        for device, offload in self._offloads.items():
            offload.scope = self._scope(device)
            offload.start()
        self._borders = Borders(self.model, self.placement.device_of, self.placement.main)
        for module in self.model.modules():
            setattr(module, HOOK_MARK, True)
        vars(self.model)[HANDLE] = self

    def again(self) -> Dispatch:
        """Place the model again, as before `remove()`."""
        dispatch = Dispatch(self.model, self.placement, self._no_split, self._store)
        dispatch.start()
        return dispatch

    @contextmanager
    def holding(self, module: nn.Module) -> Iterator[None]:
        """Have the weights of a module and of those in it where they compute, also after its forward."""
        with ExitStack() as stack:
            for offload in self._offloads.values():
                stack.enter_context(offload.holding(module))
            yield

    def statistics(self) -> dict[str, float]:
        """Return the offload/ metrics over all devices, and the bytes of weights by place."""
        total: dict[str, float] = {}
        for offload in self._offloads.values():
            for name, value in offload.statistics().items():
                total[name] = total.get(name, 0.0) + value
        for place, nbytes in self.bytes_at_rest().items():
            total[f"memory/weights_{place.replace(':', '_')}_gib"] = nbytes / GIB
        return total

    def bytes_at_rest(self) -> dict[str, int]:
        """Return true bytes by place: "cpu", "disk", "cuda:0", …"""
        found: Counter[str] = Counter()
        for device, offload in self._offloads.items():
            found.update({str(device): offload.outside_bytes()})
            found.update(offload.bytes_at_rest())
        return {place: nbytes for place, nbytes in found.items() if nbytes}

    def remove(self) -> None:
        """Remove the placement: offloaded weights return to the CPU, the others stay."""
        if vars(self.model).get(HANDLE) is self:
            del vars(self.model)[HANDLE]
        if self._borders is not None:
            self._borders.remove()
        for offload in self._offloads.values():
            offload.remove()
        for module in self.model.modules():
            vars(module).pop(HOOK_MARK, None)
        self._offloads, self._by_owner, self._borders = {}, {}, None

    def _plan(self) -> None:
        for device in sorted({self.placement.main, *self.placement.computes.values()}, key=str):
            groups, depth = self._choose(device)
            config = OffloadConfig("leaf", "disk" if device.type == "cpu" else "cpu", prefetch_depth=2)
            config = replace(config.resolved(device.type), use_stream=has_streams(device.type, config.to) and depth > 1)
            rests = {to: sum(group.nbytes for group in groups if group.to == to) for to in ("cpu", "disk")}
            if rests["disk"] and self._store is None:
                raise ConfigError(
                    f"device_map puts {rests['disk'] / GIB:.3f} GiB on disk, but no folder is given; pass "
                    "offload_folder, or put less on disk (with max_memory for the CPU, or another map)"
                )
            self._offloads[device] = Offload(self.model, config, device)
            self._offloads[device].open(self._store, in_memory=rests["cpu"], on_disk=rests["disk"])
            self._by_owner.update({id(owner): group for group in groups for owner in group.owners})

    def _choose(self, device: torch.device) -> tuple[list[Travelling], int]:
        """Choose the largest groups, and the number of slots, that fit on a device."""
        room = self.placement.room.get(device, float("inf"))
        ways: list[tuple[Collection[str], int]] = [(self._no_split, 2), ((), 2), (self._no_split, 1), ((), 1)]
        largest = depth = 0
        for whole, depth in ways if has_streams(device.type, "disk") else ways[2:]:
            groups = [group for group in self._travelling(whole) if group.device == device]
            largest = max((group.nbytes for group in groups), default=0)
            if depth * largest <= room:
                return groups, depth
        raise ConfigError(
            f"device_map leaves {max(room, 0) / GIB:.6f} GiB of {device} for offloaded layers, but the largest needs "
            f"{largest / GIB:.6f} GiB; put less on {device}, or raise its max_memory"
        )

    def _travelling(self, whole: Collection[str]) -> Iterator[Travelling]:
        divided = {name[:end] for name in self.placement.places for end, mark in enumerate(name) if mark == "."}
        divided |= {""} if set(self.placement.places) != {""} else set()
        for name, units in units_of(self.model, whole, lambda name: name not in divided):
            tensors = [tensor for _, owners in units for owner in owners for tensor in self._tensors[id(owner)]]
            if not tensors:
                continue
            place, device = self.placement.place_of(tensors[0]), self.placement.device_of(tensors[0])
            if place != device:
                nbytes = sum(self.placement.nbytes.get(tensor, 0) + PADDING_BYTES for tensor in tensors)
                yield Travelling(name, units, str(place), device, nbytes)

    def _group_of(self, tensor: str) -> Travelling | None:
        return self._by_owner.get(id(self.model.get_submodule(tensor.rpartition(".")[0])))

    def _pack(self, travelling: Travelling) -> None:
        """Pack the tensors of a group.

        Those still without data are set after loading and stay on the device (scales of activations).
        """
        if travelling.packed:
            return
        travelling.packed = True
        group = Group(travelling.name, travelling.units, origin=torch.device("cpu"))
        group.sites = [[site for site in row if not _is_empty(site)] for row in group.sites]
        if any(group.sites):
            self._offloads[travelling.device].pack(group, travelling.to)

    def _scope(self, device: torch.device) -> list[Site]:
        return [
            site
            for name, module in self.model.named_modules()
            for site in sites(module)
            if self.placement.device_of(f"{name}.{site[1]}" if name else site[1]) == device
        ]


def _is_empty(site: Site) -> bool:
    return any(leaf.is_meta for leaf in leaves(site[0][site[1]]))


def _tensor_names(model: nn.Module) -> dict[int, list[str]]:
    """Full names of the tensors of each module itself, by the module's id."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        own = {**module._parameters, **module._buffers}.items()
        names[id(module)] = [f"{name}.{key}" if name else key for key, value in own if value is not None]
    return names
