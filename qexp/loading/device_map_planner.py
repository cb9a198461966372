"""Which device each module goes to, given how many bytes each tensor will have and how much room each device has.

The rule is that of accelerate's `infer_auto_device_map` and `get_balanced_memory`, so that a dense model is placed as
users of other libraries know it. The difference is what is counted: accelerate multiplies elements by one dtype's size,
which is wrong for packed weights; here each tensor counts the bytes that it will really have.

Modules are put on the first device, in the order of the model, until one does not fit; that one is split into its
parts, or, where it must not be split, starts the next device. On the first accelerator, and on the CPU, room is kept
for the largest layer that is still to come: one that ends on a slower place needs it while it runs. Tied parameters
are put together. Two gaps of the original are closed: buffers of a module that is split get a device, and tied
parameters of the model itself do not end the search.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

from qexp.system.device_names import Key


@dataclass(eq=False, slots=True)
class Node:
    """A module or a tensor. What is tied or shared counts where it comes first.

    nbytes, tensors: bytes and number of all tensors below it; largest: bytes of the largest layer below it, a layer
    being a module that is not or must not be divided.
    """

    name: str
    kind: str  # the module's class; empty for a tensor
    nbytes: int = 0
    tensors: int = 0
    largest: int = 0
    is_divisible: bool = False
    parameters: list[Node] = field(default_factory=list)
    children: list[Node] = field(default_factory=list)
    buffers: list[Node] = field(default_factory=list)

    @property
    def parts(self) -> list[Node]:
        return [*self.parameters, *self.children, *self.buffers]

    def covers(self, name: str) -> bool:
        """Whether the tensor of that full name is this one, or below this module."""
        return name == self.name or name.startswith(f"{self.name}.")

    def layers(self, nbytes: int) -> Iterator[Node]:
        """The layers below of exactly that size; tensors are their own."""
        if not self.is_divisible:
            if self.nbytes == nbytes:
                yield self
            return
        for child in self.children:
            if child.largest >= nbytes:
                yield from child.layers(nbytes)


def build_tree(model: nn.Module, nbytes_of: Callable[[str], int], no_split: Collection[str]) -> Node:
    """The tree of a model. nbytes_of: a tensor's full name -> its bytes once it is loaded."""
    seen: set[int] = set()

    def tensors(prefix: str, values: Mapping[str, object]) -> list[Node]:
        nodes = []
        for name, value in values.items():
            if value is not None:
                first = id(value) not in seen
                seen.add(id(value))
                nbytes = nbytes_of(prefix + name) if first else 0
                nodes.append(Node(prefix + name, "", nbytes, int(first), largest=nbytes))
        return nodes

    def visit(name: str, module: nn.Module) -> Node:
        prefix = f"{name}." if name else ""
        node = Node(name, type(module).__name__)
        node.parameters, node.buffers = tensors(prefix, module._parameters), tensors(prefix, module._buffers)
        node.children = [visit(prefix + child, part) for child, part in module.named_children()]
        node.nbytes, node.tensors = sum(p.nbytes for p in node.parts), sum(p.tensors for p in node.parts)
        node.is_divisible = bool(node.children) and node.kind not in no_split
        node.largest = max(child.largest for child in node.children) if node.is_divisible else node.nbytes
        return node

    return visit("", model)


def balanced_limits(
    root: Node, limits: Mapping[Key, int], no_split: Collection[str], *, low_zero: bool
) -> dict[Key, int]:
    """Lower limits of all accelerators but the last, so that each gets about as much as the others.

    low_zero: accelerator 0 gets only what does not fit on the others. Source: accelerate's `get_balanced_memory`.
    """
    balanced = dict(limits)
    indices = sorted(key for key, room in limits.items() if isinstance(key, int) and room > 0)
    if not indices:
        return balanced
    low_zero = low_zero and len(indices) > 1
    share = root.nbytes // (len(indices) - low_zero)
    modules = [node for node in _modules(root) if node.tensors and node is not root]
    undivided: dict[str, int] = {}  # class that must not be divided -> bytes of the first module of it
    for node in modules:
        if node.kind in no_split:
            undivided.setdefault(node.kind, node.nbytes)
    final = [node.nbytes for node in modules if not any(child.tensors for child in node.children)]
    share += int(1.25 * max(sum(final) // max(len(final), 1), max(undivided.values(), default=0)))
    first, *others = indices
    for index in indices[:-1]:
        balanced[index] = min(balanced[index], balanced[first] if low_zero and index == first else share)
    if low_zero:
        balanced[first] = min(max(0, root.nbytes - sum(balanced[index] for index in others)), balanced[first])
    return balanced


def _modules(node: Node) -> Iterator[Node]:
    yield node
    for child in node.children:
        yield from _modules(child)


class Reserve:
    """The room to keep for the largest layer that is still to come."""

    def __init__(self, nodes: list[Node]) -> None:
        self.nbytes = max((node.largest for node in nodes), default=0)
        self._layers = {layer for node in nodes for layer in node.layers(self.nbytes)}

    def without(self, node: Node, left: list[Node]) -> Reserve:
        """The room to keep while a node is being placed, with `left` to come after it."""
        self._layers.difference_update(node.layers(self.nbytes))
        return self if self._layers else Reserve([other for other in left if other.kind])


class Plan:
    """The search itself: `devices` is complete when it has been made."""

    def __init__(self, root: Node, limits: Mapping[Key, int], ties: list[list[str]]) -> None:
        """limits: in the order in which devices are filled; the disk comes last, and takes what is left.

        ties: full names of tensors that are one and the same.
        """
        self.devices: dict[str, Key] = {}
        self.used: dict[Key, int] = dict.fromkeys([*limits, "disk"], 0)
        self._limits, self._ties = limits, ties
        self._left = root.parts[::-1]  # the next one last
        self._reserve = Reserve(self._left)
        self._divided: list[Node] = []
        accelerators = [key for key in limits if key not in ("cpu", "disk")]
        keeping = accelerators[:1] if "mps" in accelerators else [*accelerators[:1], "cpu"]
        for key in self.used:
            self._fill(key, reserve=key in keeping)
        for node in self._divided:
            first = next(device for name, device in self.devices.items() if name.startswith(f"{node.name}."))
            self.devices.update({buffer.name: first for buffer in node.buffers})

    def _fill(self, key: Key, *, reserve: bool) -> None:
        """Put nodes on a device until one does not fit."""
        while self._left:
            node = self._left.pop()
            self._reserve = self._reserve.without(node, self._left)
            kept = self._reserve.nbytes if reserve else 0
            room = float("inf") if key == "disk" else self._limits[key] - self.used[key] - kept
            tied = self._tied_to(node)
            nbytes = node.nbytes + sum(other.nbytes for other in tied)
            if nbytes <= room:
                self._put([node, *tied], key)
                self.used[key] += nbytes
            elif node.nbytes <= room and (dividing := next((other for other in tied if other.is_divisible), None)):
                self._divide(dividing, self._left.index(dividing), [node])
            elif node.nbytes >= room and node.is_divisible:
                self._divide(node, len(self._left), [])
            else:
                self._left.append(node)
                return

    def _put(self, nodes: list[Node], key: Key) -> None:
        for node in nodes:
            self.devices[node.name] = key
            if node in self._left:
                self._left.remove(node)

    def _divide(self, node: Node, index: int, again: list[Node]) -> None:
        """Replace a node, at `index` of those left, by its parts, and go on with the ones in `again`."""
        self._divided.append(node)
        self._left[index : index + 1] = [*node.children[::-1], *node.parameters[::-1]]
        self._left += again
        self._reserve = Reserve([other for other in self._left if other.kind])

    def _tied_to(self, node: Node) -> list[Node]:
        """What is still to be placed and has a tensor tied to one of this node, once for each such tensor."""
        found = []
        for names in self._ties:
            outside = [name for name in names if not node.covers(name)]
            if len(outside) < len(names):
                holders = [next((o for o in reversed(self._left) if o.covers(name)), None) for name in outside]
                found += [holder for holder in holders if holder is not None]
        return found


def merge_entries(devices: Mapping[str, Key]) -> dict[str, Key]:
    """A shorter map of the same meaning: modules all of whose parts are on one device, instead of the parts."""
    merged: dict[str, Key] = {}

    def visit(name: str, names: list[str]) -> None:
        found = {devices[entry] for entry in names}
        if len(names) > 1 and len(found) == 1:
            merged[name] = found.pop()
            return
        below: dict[str, list[str]] = {}
        start = len(name) + 1 if name else 0
        for entry in names:
            end = entry.find(".", start)
            if end < 0:
                merged[entry] = devices[entry]
            else:
                below.setdefault(entry[:end], []).append(entry)
        for child, entries in below.items():
            visit(child, entries)

    visit("", list(devices))
    return merged
