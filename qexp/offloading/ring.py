"""The ring: as many slots of device memory as there are groups at a time, each as large as the largest group.

On an accelerator a slot holds one group. Where slots are shared, small groups lie in a slot one after the other,
and each gives its place up when it has run: then more than `depth` groups are fetched ahead, in the same memory. A
group never reaches over the end of a slot, so that two of the largest ones always fit beside each other.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qexp.offloading.disk import PAGE
from qexp.offloading.group import ALIGNMENT, Binding, Group
from qexp.offloading.host import aligned_buffer
from qexp.offloading.streams import Streams

KEPT_STARTS = 4  # places in a slot for which a group's bindings are kept: in a steady state it comes to the same ones


@dataclass(eq=False)
class Stay:
    """A group in a slot, from byte `start` on."""

    group: Group
    slot: Slot
    start: int
    users: int = 0  # modules of the group that are in their forward now
    ready: Any = None  # the event after its copy

    @property
    def end(self) -> int:
        return self.start + self.group.nbytes

    @property
    def memory(self) -> Tensor:
        return self.slot.flat[self.start : self.end]

    def bindings(self) -> list[Binding]:
        return self.slot.bindings(self.group, self.start)


class Slot:
    """A piece of device memory that one group after the other uses."""

    def __init__(self, nbytes: int, device: torch.device, alignment: int = ALIGNMENT) -> None:
        self.flat = aligned_buffer(nbytes, device, alignment=alignment)
        self.stays: list[Stay] = []
        self.position = 0  # where the next group may follow the last one that came
        self.copied: Any = None  # event after the last copy
        self.free: Any = None  # event after the last use
        self._bindings: dict[Group, dict[int, list[Binding]]] = {}
        self._staging = torch.empty(0, dtype=torch.uint8)

    def bindings(self, group: Group, start: int) -> list[Binding]:
        kept = self._bindings.setdefault(group, {})
        if start not in kept:
            if len(kept) == KEPT_STARTS:
                del kept[next(iter(kept))]
            kept[start] = group.bindings(self.flat[start : start + group.nbytes], frozen=True)
        return kept[start]

    def staging(self, nbytes: int) -> Tensor:
        """Return a pinned host buffer on the way from disk to this slot, once the copy before has left it."""
        if self.copied is not None:
            self.copied.synchronize()
        if self._staging.numel() < nbytes:
            self._staging = aligned_buffer(self.flat.numel(), torch.device("cpu"), pinned=True)
        return self._staging[:nbytes]

    def overlapping(self, start: int, nbytes: int) -> list[Stay]:
        return [stay for stay in self.stays if stay.start < start + nbytes and start < stay.end]

    def forget(self, group: Group) -> None:
        self._bindings.pop(group, None)


class Ring:
    """The slots of one engine, and which group is where.

    slots: the least recently used first; where they are shared, the one that began to be filled first.
    """

    def __init__(self, streams: Streams, depth: int) -> None:
        self.streams, self.depth = streams, depth
        self.slots: list[Slot] = []
        self._stays: dict[Group, Stay] = {}
        self._filling: Slot | None = None  # where the last group was put

    @property
    def nbytes(self) -> int:
        return sum(slot.flat.numel() for slot in self.slots)

    def open(self, sizes: Collection[int]) -> None:
        """Make the slots for groups of these sizes."""
        largest = max(sizes, default=0)
        self.slots = [self.new_slot(largest) for _ in range(min(self.depth, len(sizes)))]

    def stay_of(self, group: Group) -> Stay | None:
        return self._stays.get(group)

    def room_for(self, group: Group, needed: Collection[Group]) -> Stay | None:
        """Return a place that no running and no needed group has; whoever has it now loses it."""
        place = next(
            (found for found in self._places(group.nbytes) if self._is_idle(*found, group.nbytes, needed)), None
        )
        if place is None:
            return None
        slot, start = place
        if slot.flat.numel() < start + group.nbytes:
            slot = self._enlarged(slot, group.nbytes)
        return self._put(group, slot, start)

    def extra_room_for(self, group: Group) -> Stay:
        """Return a place in a slot of its own: it runs inside another group."""
        self.slots.append(self.new_slot(group.nbytes))
        return self._put(group, self.slots[-1], 0)

    def _put(self, group: Group, slot: Slot, start: int) -> Stay:
        for stay in self._there(slot, start, group.nbytes):
            self.leave(stay)
        self._filling, slot.position = slot, -(-(start + group.nbytes) // PAGE) * PAGE
        if self.streams.shares_slots and start == 0:
            self._move_to_end(slot)  # slots are filled in turn
        return Stay(group, slot, start)

    def arrive(self, stay: Stay) -> None:
        """The group's bytes are there, or on their way."""
        stay.slot.stays.append(stay)
        self._stays[stay.group] = stay

    def leave(self, stay: Stay) -> None:
        stay.slot.stays.remove(stay)
        if self._stays.get(stay.group) is stay:
            del self._stays[stay.group]

    def forget(self, group: Group) -> None:
        """Its bytes are others now. A module that still runs with the old ones keeps their place."""
        self._stays.pop(group, None)
        for slot in self.slots:
            slot.forget(group)
            slot.stays = [stay for stay in slot.stays if stay.group is not group or stay.users]

    def close(self) -> None:
        """Free all slots: nothing runs any more."""
        for slot in list(self.slots):
            self._remove(slot)

    def give_up(self) -> None:
        """Free the slots that no running module uses; their memory stays with the compute stream, which used them."""
        for slot in [slot for slot in self.slots if not any(stay.users for stay in slot.stays)]:
            self._remove(slot)

    def mark_used(self, slot: Slot) -> None:
        if not self.streams.shares_slots:
            self._move_to_end(slot)

    def _move_to_end(self, slot: Slot) -> None:
        self.slots.remove(slot)
        self.slots.append(slot)

    def new_slot(self, nbytes: int) -> Slot:
        slot = Slot(nbytes, self.streams.device, PAGE if self.streams.shares_slots else ALIGNMENT)
        self.streams.announce(slot.flat)
        slot.free = self.streams.record()  # its memory may have been freed by kernels that have yet to run
        return slot

    def _places(self, nbytes: int) -> list[tuple[Slot, int]]:
        """Yield places for a group: behind the last one, else at the start of a slot, rather one not used lately."""
        places = [(slot, 0) for slot in self.slots]
        if self.streams.shares_slots and self._filling in self.slots:
            assert self._filling is not None
            if self._filling.position + nbytes <= self._filling.flat.numel():
                places.insert(0, (self._filling, self._filling.position))
        return places

    def _is_idle(self, slot: Slot, start: int, nbytes: int, needed: Collection[Group]) -> bool:
        return not any(
            stay.users or (stay.group in needed and self._stays.get(stay.group) is stay)
            for stay in self._there(slot, start, nbytes)
        )

    def _there(self, slot: Slot, start: int, nbytes: int) -> list[Stay]:
        """Who would have to go."""
        is_whole = not self.streams.shares_slots or slot.flat.numel() < start + nbytes  # too small: it is replaced
        return list(slot.stays) if is_whole else slot.overlapping(start, nbytes)

    def _enlarged(self, slot: Slot, nbytes: int) -> Slot:
        self.streams.synchronize()
        self._remove(slot)
        self.slots.append(self.new_slot(nbytes))
        return self.slots[-1]

    def _remove(self, slot: Slot) -> None:
        for stay in list(slot.stays):
            self.leave(stay)  # slot and stays refer to each other: nothing else would free the memory at once
        self.slots.remove(slot)
        if self._filling is slot:
            self._filling = None
