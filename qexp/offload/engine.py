"""The engine: brings each group to the compute device when it runs, in one transfer, into a ring of reused slots.

While a group runs, its modules hold values built around a slot; otherwise they hold views of where the bytes rest.
Nothing is copied back, but for the rare module that changes its own weights (see `Binding` in group.py).

On a device with streams, transfers run on a side stream, ahead of time, guarded by two events a slot:

    slot.ready   recorded on the side stream after the copy; the compute stream waits for it before the group runs
    slot.free    recorded on the compute stream after the group ran; the side stream waits for it before overwriting

What comes next is learned from what came next before, given the last two groups: no step boundaries are needed, and the
first groups of the next step are fetched at the end of this one. So up to `depth - 1` groups have been transferred
for a step that may never come, and fewer than all are transferred again in a step that finds them in their slots.
On the CPU there is one slot and no prefetch: memory stays at one group. What comes after the groups that are fetched
is announced to where it rests: the system then reads ahead from disk, into its page cache.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qexp.offload.group import Binding, Group, MakeRest
from qexp.offload.host import aligned_buffer

HOOK_MARK = "_qexp_offload"  # attribute of every module that is run by an engine


class Streams:
    """Copies on a side stream, where the device has streams and the caller wants them; else in program order."""

    def __init__(self, device: torch.device, *, use_stream: bool, non_blocking: bool = True) -> None:
        self.device, self.non_blocking = device, non_blocking
        self.module: Any = None if device.type == "cpu" else torch.get_device_module(device)
        self.side: Any = self.module.Stream(device=device) if self.module and use_stream else None

    @property
    def asynchronous(self) -> bool:
        return self.side is not None

    def copying(self) -> Any:
        return self.module.stream(self.side) if self.side else nullcontext()

    def copy_waits_for(self, event: Any) -> None:
        if self.side and event is not None:
            self.side.wait_event(event)

    def compute_waits_for(self, event: Any) -> None:
        if self.side and event is not None:
            self.module.current_stream(self.device).wait_event(event)

    def record(self) -> Any:
        """An event on the stream that is current: the side stream inside `copying()`, else the compute stream."""
        return self.module.current_stream(self.device).record_event() if self.module else None

    def announce(self, memory: Tensor) -> None:
        """Tell the allocator that the side stream uses some memory: its owner may be dropped with copies in flight."""
        if self.side:
            memory.record_stream(self.side)

    def synchronize(self) -> None:
        if self.module:
            self.module.synchronize(self.device)


class Slot:
    """A piece of device memory that one group after the other uses."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.flat = aligned_buffer(nbytes, device)
        self.owner: Group | None = None
        self.users = 0  # modules of the owner that are in their forward now
        self.ready: Any = None
        self.free: Any = None
        self._bindings: dict[Group, list[Binding]] = {}
        self._staging = torch.empty(0, dtype=torch.uint8)

    def bindings(self, group: Group) -> list[Binding]:
        if group not in self._bindings:
            self._bindings[group] = group.bindings(self.flat, frozen=True)
        return self._bindings[group]

    def staging(self, nbytes: int) -> Tensor:
        """A pinned host buffer on the way from disk to this slot, once the copy before has left it."""
        if self.ready is not None:
            self.ready.synchronize()
        if self._staging.numel() < nbytes:
            self._staging = aligned_buffer(self.flat.numel(), torch.device("cpu"), pinned=True)
        return self._staging[:nbytes]

    def forget(self, group: Group) -> None:
        self._bindings.pop(group, None)
        if self.owner is group:
            self.owner = None


class Order:
    """What comes next: what followed the last two groups the last time, else what followed the last one."""

    def __init__(self) -> None:
        self._next: dict[tuple[Group | None, Group | None], Group] = {}
        self._last: tuple[Group | None, Group | None] = (None, None)

    def visit(self, group: Group) -> None:
        before, last = self._last
        if last is not group:
            self._next[before, last] = self._next[None, last] = group
            self._last = (last, group)

    def ahead(self, count: int) -> list[Group]:
        found: list[Group] = []
        before, last = self._last
        while len(found) < count:
            following = self._next.get((before, last)) or self._next.get((None, last))
            if following is None:
                break
            found.append(following)
            before, last = last, following
        return found


@dataclass
class Visit:
    """A module that is in its forward: what it holds, and how often it has called itself."""

    slot: Slot
    binding: Binding
    recursion: int = 0


class Engine:
    """Runs the groups of one model on one device."""

    def __init__(
        self,
        groups: list[Group],
        streams: Streams,
        make_rest: MakeRest,
        *,
        depth: int,
        take_turn: Callable[[Engine], None] | None = None,
    ) -> None:
        """depth: slots in the ring; with asynchronous streams, `depth - 1` groups are fetched ahead.

        take_turn: makes room on the device; slots are then made when they are needed, and given up when asked for.
        """
        self.groups, self.streams, self.make_rest, self.depth = groups, streams, make_rest, depth
        self.take_turn = take_turn
        self.slots: list[Slot] = []  # the least recently used first
        self.order = Order()
        self.transferred_bytes = 0
        self.copies = 0
        self._running: dict[tuple[Group, int], Visit] = {}
        self._handles: list[RemovableHandle] = []

    def attach(self, model: nn.Module) -> None:
        """Hook the groups' modules. The hook that leaves a group also runs after an exception."""
        for group in self.groups:
            for index, module in enumerate(group.modules):
                self._hook(module, group, index)
        self._handles.append(model.register_forward_pre_hook(lambda *_: self.reset(), prepend=True))
        if self.take_turn is None:
            largest = max((group.nbytes for group in self.groups), default=0)
            self.slots = [self._new_slot(largest) for _ in range(min(self.depth, len(self.groups)))]

    def _hook(self, module: nn.Module, group: Group, index: int) -> None:
        def enter(*_: object) -> None:
            self.enter(group, index)

        def leave(*_: object) -> None:
            self.leave(group, index)

        setattr(module, HOOK_MARK, True)
        self._handles.append(module.register_forward_pre_hook(enter, prepend=True))
        self._handles.append(module.register_forward_hook(leave, always_call=True))

    def detach(self) -> None:
        """Unhook everything, with all groups at rest and nothing in flight."""
        self.reset()
        self.streams.synchronize()
        for handle in self._handles:
            handle.remove()
        for module in (module for group in self.groups for module in group.modules):
            vars(module).pop(HOOK_MARK, None)
        self._handles, self.slots, self.order = [], [], Order()

    def enter(self, group: Group, index: int) -> None:
        """Put the values of a group's module on the device, before its forward."""
        visit = self._running.get((group, index))
        if visit is not None:  # the module calls itself
            visit.recursion += 1
            return
        if group.at_rest[index].changed():
            self.store_changes(group)
        self.order.visit(group)
        coming = self.order.ahead(len(self.slots) - 1) if self.streams.asynchronous else []
        slot = self._slot_of(group) or self._transfer(group, self._slot_for(group, coming))
        slot.users += 1
        self._running[group, index] = Visit(slot, slot.bindings(group)[index])
        self.streams.compute_waits_for(slot.ready)
        self._running[group, index].binding.bind()
        self._mark_used(slot)
        self._prefetch(coming)
        for following in self.order.ahead(len(coming) + 1)[len(coming) :]:
            if self._slot_of(following) is None:
                following.rest.expect()

    def leave(self, group: Group, index: int) -> None:
        """Put the values at rest back, after the forward or the exception that ended it."""
        visit = self._running.get((group, index))
        if visit is None:
            return  # its enter failed
        if visit.recursion:
            visit.recursion -= 1
            return
        del self._running[group, index]
        visit.slot.users -= 1
        visit.slot.free = self.streams.record()
        if visit.binding.changed():
            self.store_changes(group)
        else:
            group.at_rest[index].bind()

    def reset(self) -> None:
        """Put everything at rest. At the start of a step this finds something only after an interrupt."""
        for (group, index), visit in self._running.items():
            visit.slot.users = 0
            visit.slot.free = self.streams.record()
            group.at_rest[index].bind()
        self._running.clear()

    def give_up(self) -> None:
        """Free the slots that no running module uses; their memory stays with the compute stream, which used them."""
        self.slots = [slot for slot in self.slots if slot.users]

    def store_changes(self, group: Group) -> None:
        """Store what a module made of its weights: they are the group's weights from now on."""
        self.streams.synchronize()
        group.pack(self.make_rest)
        for slot in self.slots:
            slot.forget(group)

    def _prefetch(self, coming: list[Group]) -> None:
        for group in coming:
            if self._slot_of(group) is None:
                idle = self._idle_slots(coming)
                if not idle:
                    return
                self._transfer(group, idle[0])

    def _slot_of(self, group: Group) -> Slot | None:
        return next((slot for slot in self.slots if slot.owner is group), None)

    def _idle_slots(self, needed: list[Group]) -> list[Slot]:
        return [slot for slot in self.slots if not slot.users and slot.owner not in needed]

    def _slot_for(self, group: Group, coming: list[Group]) -> Slot:
        """An idle slot, rather one that holds nothing that is needed soon; a new one if a group runs inside another."""
        if self.take_turn is not None:
            self.take_turn(self)
        idle = self._idle_slots(coming) or self._idle_slots([])
        if idle:
            return idle[0]
        self.slots.append(self._new_slot(group.nbytes))
        return self.slots[-1]

    def _new_slot(self, nbytes: int) -> Slot:
        slot = Slot(nbytes, self.streams.device)
        self.streams.announce(slot.flat)
        slot.free = self.streams.record()  # its memory may have been freed by kernels that have yet to run
        return slot

    def _mark_used(self, slot: Slot) -> None:
        self.slots.remove(slot)
        self.slots.append(slot)

    def _transfer(self, group: Group, slot: Slot) -> Slot:
        """Bring a group into a slot, or into a larger one in its place, and return it."""
        if slot.flat.numel() < group.nbytes:
            self.streams.synchronize()
            self.slots.remove(slot)
            slot = self._new_slot(group.nbytes)
            self.slots.append(slot)
        slot.owner = None  # until the bytes are there: a failed read must leave no name on the slot
        self.streams.copy_waits_for(slot.free)
        with self.streams.copying():
            group.rest.load_into(slot.flat[: group.nbytes], slot.staging, non_blocking=self.streams.non_blocking)
            slot.ready = self.streams.record()
        slot.owner = group
        self.transferred_bytes += group.nbytes
        self.copies += 1
        return slot
