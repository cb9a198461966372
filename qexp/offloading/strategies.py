"""The public face of offloading: `apply_offload`, and the `Offload` that it returns.

Values are taken group by group: when a group's bytes are at rest, the tensors that held them are let go before the
next group is touched. What is left behind is measured, not assumed: weak references to the original memory say whether
somebody still holds it, and `offload/at_rest_device_gib` counts that.
"""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from qexp.config.offload import OffloadConfig
from qexp.errors import ConfigError
from qexp.offloading.disk import DiskStore
from qexp.offloading.engine import HOOK_MARK, Engine
from qexp.offloading.group import Group, Pieces, Rest
from qexp.offloading.grouping import plan_groups
from qexp.offloading.host import Arena, Slabs
from qexp.offloading.payload import Site, converted, leaves, sites, span_bytes, true_nbytes
from qexp.offloading.reader import Reader
from qexp.offloading.residency import choose_resident
from qexp.offloading.streams import Streams
from qexp.offloading.turns import take_turn
from qexp.system.memory import GIB, release_freed_memory

log = logging.getLogger(__name__)

HANDLE = "_qexp_offload_handle"  # attribute of an offloaded model
FOREIGN_HOOKS = {"_hf_hook": "accelerate", "_diffusers_hook": "diffusers"}


def apply_offload(
    model: nn.Module, config: OffloadConfig, *, device: torch.device, block_lists: Sequence[str], store: Path | None
) -> Offload:
    """Move a loaded model's weights to where they rest, and hook it so that it runs on `device`.

    config: with `to` settled, as `config.resolved(device.type)` gives it; store: the folder for `to=disk`.
    Raises: ConfigError for a conflict, DiskError if the weights cannot be written; the model is then as it was.
    """
    _refuse_conflicts(model, config, device, store)
    config = config.resolved(device.type)  # for what else conflicts
    groups = [] if config.strategy == "none" else plan_groups(model, config, block_lists)
    groups = _without_resident(model, groups, round(config.resident_gib * GIB))
    offload = Offload(model, config, device)
    try:
        if groups:
            payload = sum(group.measure() for group in groups)
            offload.open(store, in_memory=payload if config.to == "cpu" else 0, on_disk=_disk_bytes(config, groups))
        for group in groups:
            offload.pack(group)
        offload.start()
    except BaseException:
        offload.remove()
        raise
    offload.again = partial(apply_offload, model, config, device=device, block_lists=block_lists, store=store)
    vars(model)[HANDLE] = offload
    return offload


class Handle(Protocol):
    """A model that is offloaded, or placed over several devices. device: where it takes its inputs."""

    @property
    def device(self) -> torch.device: ...
    def remove(self) -> None: ...
    def again(self) -> Any: ...
    def holding(self, module: nn.Module) -> AbstractContextManager[None]: ...


def offload_of(model: nn.Module) -> Handle | None:
    """Return how a model is offloaded now."""
    return vars(model).get(HANDLE)


@contextmanager
def resident(model: nn.Module) -> Iterator[None]:
    """Have the weights where they were before offloading, and offload them again, in the same way, afterwards."""
    offload = offload_of(model)
    if offload is None:
        yield
        return
    offload.remove()
    try:
        yield
    finally:
        offload.again()


def _refuse_conflicts(model: nn.Module, config: OffloadConfig, device: torch.device, store: Path | None) -> None:
    if config.strategy == "none":
        return
    if config.to == "auto":
        raise ConfigError("offload.to='auto' is not settled; pass config.resolved(device.type), which says cpu or disk")
    if config.to == "disk" and store is None:
        raise ConfigError("offload.to='disk' needs a folder for the weights: pass store, or use offload.to=cpu")
    for name, module in model.named_modules():
        where = f"offload.strategy={config.strategy!r}: '{name or type(model).__name__}'"
        for attribute, library in FOREIGN_HOOKS.items():
            if hasattr(module, attribute):
                raise ConfigError(f"{where} has a hook of {library} ({attribute}); remove it, or use offload=none")
        if hasattr(module, HOOK_MARK):
            raise ConfigError(f"{where} is offloaded already; call remove() of that Offload first")
        if device.type != "cpu" and any(_is_cpu_only(store_[key]) for store_, key in sites(module)):
            raise ConfigError(
                f"{where} has 4-bit weights that bitsandbytes repacked for the CPU, '{device}' would misread them; "
                "load the model again and run it on one kind of device only"
            )


def _without_resident(model: nn.Module, groups: list[Group], budget: int) -> list[Group]:
    """Return the groups that travel: all but those kept on the device within its budget of bytes."""
    if not budget:
        return groups
    mandatory = true_nbytes(*(store[name] for store, name in _without(all_sites(model), groups)))
    staying = choose_resident([group.measure() for group in groups], budget - mandatory)
    log.info("offload: %d of %d groups stay on the device", len(staying), len(groups))
    return [group for number, group in enumerate(groups) if number not in staying]


def all_sites(model: nn.Module) -> list[Site]:
    return [site for module in model.modules() for site in sites(module)]


def _without(places: Sequence[Site], groups: list[Group]) -> list[Site]:
    grouped = {(id(store), name) for group in groups for store, name in group.all_sites}
    return [(store, name) for store, name in places if (id(store), name) not in grouped]


def _disk_bytes(config: OffloadConfig, groups: list[Group]) -> int:
    if config.to != "disk":
        return 0
    return true_nbytes(*(place[name] for group in groups for place, name in group.all_sites))


def _is_cpu_only(value: object) -> bool:
    return getattr(getattr(value, "quant_state", None), "packing_format_for_cpu", False) is True


class Offload:
    """Weights that compute on one device and rest elsewhere: what has been moved, and the way back.

    again: offloads the model as it was.
    """

    again: Callable[[], Offload]

    def __init__(self, model: nn.Module, config: OffloadConfig, device: torch.device) -> None:
        self.model, self.config = model, config
        self.groups: list[Group] = []
        self.device = torch.empty(0, device=device).device  # with its index
        self.scope = all_sites(model)  # what computes on this device
        self._streams = (
            Reader()
            if config.use_stream and device.type == "cpu"
            else Streams(device, use_stream=bool(config.use_stream), non_blocking=config.non_blocking)
        )
        self._engine = Engine(
            self.groups,
            self._streams,
            self._make_rest,
            depth=config.prefetch_depth if config.use_stream else 1,
            take_turn=partial(take_turn, self.device) if config.strategy == "model" else None,
        )
        self._slabs = Slabs(0, pinned=self._pins)
        self._disk: DiskStore | None = None
        self._in_memory: set[str] = set()  # names of groups; the others rest on disk
        self._originals: list[tuple[Any, int]] = []  # weak references to the payload's memory on the device, and bytes
        self._resident: list[tuple[Site, Any, Any]] = []  # (site, value before, value on the device)
        self._first: dict[int, tuple[Any, int]] = {}  # id of a value before -> weak reference, number of its first site
        self._twins: list[int] = []  # for each site in order, the number of the first one that held the same object
        self._tied: list[tuple[Site, Site]] = []  # (site in a group, site outside) that held the same object

    @property
    def _pins(self) -> bool:
        return self.device.type != "cpu" and not self.config.low_cpu_mem

    def statistics(self) -> dict[str, float]:
        """Return the offload/ metrics, until `remove()`.

        Payload and transfers include the padding that aligns each leaf.
        """
        payload = sum(group.nbytes for group in self.groups)
        return {
            "offload/groups": float(len(self.groups)),
            "offload/payload_gib": payload / GIB,
            "offload/resident_gib": self.outside_bytes() / GIB,
            "offload/at_rest_device_gib": self._at_rest_device_bytes() / GIB,
            "offload/ring_gib": self._engine.ring.nbytes / GIB,
            "offload/transferred_gib": self._engine.transferred_bytes / GIB,
            "offload/copies": float(self._engine.copies),
        }

    def holding(self, module: nn.Module) -> AbstractContextManager[None]:
        """Have the weights of a module and of those in it on the device, also after its forward: for its backward."""
        return self._engine.holding(module)

    def remove(self) -> None:
        """Give every module its values back, in memory of their own where they were before, and clean up."""
        if offload_of(self.model) is self:
            del vars(self.model)[HANDLE]
        self._engine.detach()
        restored: dict[int, Any] = {}
        position = 0
        for group in self.groups:
            if group.packed:
                if any(binding.changed() for binding in group.at_rest):
                    group.pack(self._make_rest)
                for number, ((store, name), value) in enumerate(group.restore(), position):
                    store[name] = restored.setdefault(self._twins[number], value)
                group.release()
            position += len(group.all_sites)
        for (store, name), before, moved in self._resident:
            if store.get(name) is moved:
                store[name] = before
        for (store, name), (outside, key) in self._tied:
            store[name] = outside[key]
        self._tied, self._resident, self._twins, self.scope = [], [], [], []  # modules may be replaced from now on
        self.groups.clear()
        if self._disk is not None:
            self._disk.remove()
            self._disk = None

    def open(self, store: Path | None, *, in_memory: int, on_disk: int) -> None:
        """Get ready for groups of so many bytes. store: the folder for those on disk.

        Raises: DiskError if there is no room.
        """
        if on_disk and store is not None:
            self._disk = DiskStore(store, on_disk, direct=self._streams.shares_slots)
        if in_memory:
            self._slabs = Slabs(in_memory, pinned=self._pins)

    def pack(self, group: Group, to: str | None = None) -> None:
        """Move a group's values to where they rest. to: cpu or disk, if that is not the same for all groups."""
        if (to or self.config.to) == "cpu":
            self._in_memory.add(group.name)
        self._originals += self._memory_on_device(group)
        for store, name in group.all_sites:
            value = store[name]
            reference, number = self._first.get(id(value), (None, 0))
            if reference is None or reference() is not value:  # also where another object had that id before
                number = len(self._twins)
                self._first[id(value)] = (weakref.ref(value), number)
            self._twins.append(number)
        self.groups.append(group)
        group.pack(self._make_rest)

    def start(self) -> None:
        """Run the model from now on: every group is packed."""
        self._tied = self._find_tied()
        self._move_resident()
        self._engine.attach(self.model)
        self._let_go()

    def _make_rest(self, name: str, nbytes: int, pieces: Pieces) -> Rest:
        if name in self._in_memory:
            return Arena(self._slabs.take(nbytes), pieces, staged=self.config.low_cpu_mem)
        assert self._disk is not None
        return self._disk.write(name, nbytes, pieces)

    def _find_tied(self) -> list[tuple[Site, Site]]:
        inside = [site for group in self.groups for site in group.all_sites]
        outside: dict[int, Site] = {}
        for store, name in self._outside():
            reference, number = self._first.get(id(store[name]), (None, 0))
            if reference is not None and reference() is store[name]:
                outside[number] = (store, name)
        return [(site, outside[twin]) for site, twin in zip(inside, self._twins, strict=True) if twin in outside]

    def _outside(self) -> list[Site]:
        return _without(self.scope, self.groups)

    def _memory_on_device(self, group: Group) -> list[tuple[Any, int]]:
        found = [leaf for store, name in group.all_sites for leaf in leaves(store[name]) if leaf.device == self.device]
        distinct = {(leaf.data_ptr(), span_bytes(leaf)): leaf for leaf in found}
        weak: Any = StorageWeakRef
        return [(weak(leaf.untyped_storage()), span) for (_, span), leaf in distinct.items()]

    def _move_resident(self) -> None:
        """Bring what belongs to no group to the device, through its leaves: `.to()` of some tensors loses parts.

        What is one object or one piece of memory stays so, as in a group.
        """
        places = self._outside()
        values = [store[name] for store, name in places]
        if all(leaf.device == self.device for value in values for leaf in leaves(value)):
            return
        for (store, name), moved in zip(places, converted(values, lambda leaf: leaf.to(self.device)), strict=True):
            self._resident.append(((store, name), store[name], moved))
            store[name] = moved

    def outside_bytes(self) -> int:
        """Return bytes of what computes on the device and does not travel."""
        return true_nbytes(*(store[name] for store, name in self._outside()))

    def bytes_at_rest(self) -> dict[str, int]:
        """Return bytes of what travels: in host memory ("cpu") and on disk, padding included."""
        found = {"cpu": 0, "disk": 0}
        for group in self.groups:
            found["cpu" if group.name in self._in_memory else "disk"] += group.nbytes
        return found

    def _let_go(self) -> None:
        """Free what the originals used, and say so if somebody else still holds some of it."""
        if self._left_behind():
            gc.collect()
        if self.device.type == "cpu":
            release_freed_memory()
        elif hasattr(self._streams.module, "empty_cache"):
            self._streams.module.empty_cache()
        if left := self._left_behind():
            log.warning(
                "offload: %.1f MiB of the weights of %s are still held by something else, and stay in memory",
                left / 2**20,
                type(self.model).__name__,
            )

    def _left_behind(self) -> int:
        return sum(nbytes for storage, nbytes in self._originals if not storage.expired())

    def _at_rest_device_bytes(self) -> int:
        """Payload bytes in memory of the compute device while the model is idle, the ring apart."""
        if not self.groups:
            return self.outside_bytes()
        resting = [group.rest.flat for group in self.groups if group.rest.in_memory]
        return self._left_behind() + sum(flat.numel() for flat in resting if flat.device == self.device)
