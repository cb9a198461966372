"""The engine copies each group to the compute device before it runs, in one transfer, into a ring of reused slots.

While a group runs, its modules hold values built around a slot; otherwise they hold views of where the bytes rest.
Nothing is copied back, but for the rare module that changes its own weights (see `Binding` in group.py).

On a device with streams, transfers run on a side stream, ahead of time, guarded by two events a slot:

    stay.ready   recorded on the side stream after the copy; the compute stream waits for it before the group runs
    slot.free    recorded on the compute stream after the group ran; the side stream waits for it before overwriting

What comes next is learned from what came next before, given the last two groups: no step boundaries are needed, and the
first groups of the next step are fetched at the end of this one. So up to `depth - 1` groups have been transferred
for a step that may never come, and fewer than all are transferred again in a step that finds them in their slots.
On the CPU, weights on disk are fetched ahead by a thread that reads them into the slots (reader.py), past the page
cache: there is no other device that a copy could go to. Small groups share slots (ring.py).

Without streams, as for `sequential`, there is one slot and nothing is fetched ahead. What comes next is then announced
to where it rests, as is, on a device with streams, what comes after the groups that are fetched: the system reads ahead
from disk, into its page cache.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice

from torch import nn
from torch.utils.hooks import RemovableHandle

from qexp.offloading.group import Binding, Group, MakeRest
from qexp.offloading.grouping import called_children
from qexp.offloading.ring import Ring, Stay
from qexp.offloading.streams import Streams

MOST_AHEAD = 64  # groups; it takes many of the smallest to fill a slot, and nothing is gained by more
HOOK_MARK = "_qexp_offload"  # attribute of every module that is run by an engine


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

    def ahead(self) -> Iterator[Group]:
        before, last = self._last
        while following := self._next.get((before, last)) or self._next.get((None, last)):
            yield following
            before, last = last, following


@dataclass
class Visit:
    """A module that is in its forward: what it holds, and how often it has called itself."""

    stay: Stay
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
        """depth: slots in the ring; with asynchronous streams, `depth - 1` slots are filled ahead.

        take_turn: makes room on the device; slots are then created when needed, and released on request.
        """
        self.groups, self.streams, self.make_rest = groups, streams, make_rest
        self.take_turn = take_turn
        self.ring = Ring(streams, depth)
        self.order = Order()
        self.transferred_bytes = 0
        self.copies = 0
        self._running: dict[tuple[Group, int], Visit] = {}
        self._handles: list[RemovableHandle] = []
        self._hooked: list[nn.Module] = []

    def attach(self, model: nn.Module) -> None:
        """Hook the groups' modules. The hook that leaves a group also runs after an exception.

        A model that travels as a whole is also entered by its parts: an autoencoder is called by `decode`, and not as a
        module. Within its own forward they count as calls of itself.
        """
        for group in self.groups:
            for index, module in enumerate(group.modules):
                for part in (module, *(called_children(module) if self.take_turn is not None else ())):
                    self._hook(part, group, index)
        self._handles.append(model.register_forward_pre_hook(lambda *_: self.reset(), prepend=True))
        if self.take_turn is None:
            self.ring.open([group.nbytes for group in self.groups])

    def _hook(self, module: nn.Module, group: Group, index: int) -> None:
        setattr(module, HOOK_MARK, True)
        self._hooked.append(module)
        self._handles += [
            module.register_forward_pre_hook(lambda *_: self.enter(group, index), prepend=True),
            module.register_forward_hook(lambda *_: self.leave(group, index), always_call=True),
        ]

    def detach(self) -> None:
        """Remove all hooks, after all groups returned to their storage and transfers ended."""
        self.reset()
        self.streams.close()
        self.ring.close()
        for handle in self._handles:
            handle.remove()
        for module in self._hooked:
            vars(module).pop(HOOK_MARK, None)
        self._handles, self._hooked, self.order = [], [], Order()

    def enter(self, group: Group, index: int) -> None:
        """Bind a module's weights on the device, before its forward."""
        visit = self._running.get((group, index))
        if visit is not None:  # the module calls itself
            visit.recursion += 1
            return
        if group.at_rest[index].changed():
            self.store_changes(group)
        self.order.visit(group)
        stay = self._hold(group, self._coming(group))
        self._running[group, index] = Visit(stay, stay.bindings()[index])
        self._running[group, index].binding.bind()

    def _coming(self, group: Group) -> dict[Group, None]:
        """Return the groups to prefetch: one per other slot, or as many as fit if slots are shared."""
        if not self.streams.asynchronous:
            return {}
        if not self.streams.shares_slots:
            return dict.fromkeys(islice(self.order.ahead(), len(self.ring.slots) - 1))
        coming, left = dict[Group, None](), self.ring.nbytes
        for following in islice(self.order.ahead(), MOST_AHEAD):
            left -= following.nbytes
            if left < 0 or following is group:
                break
            coming[following] = None
        return coming

    def _hold(self, group: Group, coming: Collection[Group]) -> Stay:
        """Return the group's place in the ring with its bytes, and start to prefetch the next groups."""
        stay = self.ring.stay_of(group) or self._transfer(self._room_for(group, coming))
        stay.users += 1
        try:
            self.ring.mark_used(stay.slot)
            self._prefetch(coming)
            self.streams.compute_waits_for(stay.ready)
        except BaseException:
            stay.users -= 1
            if not stay.users:
                self.ring.leave(stay)  # a failed read must leave no name on the slot
            raise
        return stay

    def leave(self, group: Group, index: int) -> None:
        """Bind the stored weights again, after the forward or its exception."""
        visit = self._running.get((group, index))
        if visit is None:
            return  # its enter failed
        if visit.recursion:
            visit.recursion -= 1
            return
        del self._running[group, index]
        visit.stay.users -= 1
        visit.stay.slot.free = self.streams.record()
        if visit.binding.changed():
            self.store_changes(group)
        else:
            group.at_rest[index].bind()

    @contextmanager
    def holding(self, module: nn.Module) -> Iterator[None]:
        """Have the weights of a module, and of all modules in it, on the device, whether or not it is called."""
        parts = {id(part) for part in module.modules()}
        with ExitStack() as stack:
            for group in self.groups:
                for index, owner in enumerate(group.modules):
                    if id(owner) in parts:
                        self.enter(group, index)
                        stack.callback(self.leave, group, index)
            yield

    def reset(self) -> None:
        """Return every group to its storage; at the start of a step, needed only after an interrupt."""
        for (group, index), visit in self._running.items():
            visit.stay.users = 0
            visit.stay.slot.free = self.streams.record()
            group.at_rest[index].bind()
        self._running.clear()

    def give_up(self) -> None:
        """Release the slots on the device for another model."""
        self.ring.give_up()

    def store_changes(self, group: Group) -> None:
        """Store weights that a module has changed as the group's weights."""
        self.streams.synchronize()
        group.pack(self.make_rest)
        self.ring.forget(group)

    def _prefetch(self, coming: Collection[Group]) -> None:
        """Prefetch the next groups that fit, and announce the following ones to their storage."""
        for group in coming:
            stay = self.ring.stay_of(group)
            if stay is not None and self.streams.is_lost(stay.ready):
                self.ring.leave(stay)
                stay = None
            if stay is None:
                stay = self.ring.room_for(group, coming)
                if stay is None:
                    break
                self._transfer(stay)
        if not self.streams.shares_slots:
            for following in islice(self.order.ahead(), len(coming), len(coming) + 1):
                if self.ring.stay_of(following) is None:
                    following.rest.expect()

    def _room_for(self, group: Group, coming: Collection[Group]) -> Stay:
        """Return a place in the ring for a group that runs now; evict groups that are not needed soon first."""
        if self.take_turn is not None:
            self.take_turn(self)
        self.streams.drop_pending()
        return self.ring.room_for(group, coming) or self.ring.room_for(group, ()) or self.ring.extra_room_for(group)

    def _transfer(self, stay: Stay) -> Stay:
        """Copy a group to its place in the ring."""
        slot, group = stay.slot, stay.group
        self.streams.copy_waits_for(slot.free)
        load = partial(group.rest.load_into, stay.memory, slot.staging, non_blocking=self.streams.non_blocking)
        stay.ready = slot.copied = self.streams.run(load)
        self.ring.arrive(stay)
        self.transferred_bytes += group.nbytes
        self.copies += 1
        return stay
