"""Run a network from one of its blocks on: the blocks before it return what they returned for the same input.

Nothing is assumed about how blocks are connected. Outputs of the blocks are kept once for each call; a block whose
output cannot depend on a layer, because it had ended before the layer began, is not computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from qexp.sensitivity.samples import Batch, first_tensor


def call(model: nn.Module, batch: Batch) -> Tensor:
    """Return the output of a network for a batch."""
    with torch.no_grad():
        return first_tensor(model(*batch.args, **batch.kwargs))


def blocks_of(model: nn.Module, block_lists: Sequence[str]) -> list[nn.Module]:
    """Return the items of the block lists that are called as modules."""
    lists = [model.get_submodule(name) for name in block_lists]
    return list(dict.fromkeys(block for one in lists for block in one.children()))


def order_of_calls(
    model: nn.Module, blocks: Sequence[nn.Module], layers: Sequence[str], batch: Batch
) -> tuple[list[nn.Module], dict[str, int]]:
    """Return (blocks in the order in which they end, layer -> how many had ended when it was first called).

    A network that calls one of its blocks twice has none; a layer that is not called is not in the result.
    """
    ended: list[nn.Module] = []
    starts: dict[str, int] = {}

    def remember(name: str) -> Any:
        def hook(*_: Any) -> None:
            starts.setdefault(name, len(ended))

        return hook

    handles = [block.register_forward_hook(lambda block, *_: ended.append(block)) for block in blocks]
    handles += [model.get_submodule(name).register_forward_pre_hook(remember(name)) for name in layers]
    try:
        call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return (ended, starts) if len({*ended}) == len(ended) else ([], dict.fromkeys(starts, 0))


def called_layers(model: nn.Module, layers: Sequence[str], run: Callable[[], object]) -> set[str]:
    """Return those of the layers that are called when the model is run: an expert may have no token."""
    called: set[str] = set()
    names: dict[nn.Module, list[str]] = {}
    for layer in layers:
        names.setdefault(model.get_submodule(layer), []).append(layer)
    handles = [
        module.register_forward_pre_hook(lambda *_, own=own: called.update(own)) for module, own in names.items()
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return called


class Tail:
    """A network that can begin at a block, for some calls.

    outputs: of the unquantized network, one for each batch.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], batches: Sequence[Batch]) -> None:
        self._model, self._blocks, self._batches = model, blocks, batches
        self._kept: list[dict[nn.Module, Any]] = []
        self.outputs = [self._record(batch) for batch in batches]
        self._usable: dict[int, bool] = {}

    def _record(self, batch: Batch) -> Tensor:
        kept: dict[nn.Module, Any] = {}

        def keep(block: nn.Module, args: Any, returned: Any) -> None:
            kept[block] = tree_map_only(Tensor, torch.clone, returned)  # a network may change it in place

        handles = [block.register_forward_hook(keep) for block in self._blocks]
        try:
            output = call(self._model, batch)
        finally:
            for handle in handles:
                handle.remove()
        self._kept.append(kept)
        return output

    def run(self, start: int, number: int) -> Tensor:
        """Return the output for batch `number`, computed from block `start` on with the weights as they are now."""
        with self._skipping(start, number):
            return call(self._model, self._batches[number])

    def check(self, start: int) -> bool:
        """Return whether the unquantized network gives the same when it begins at a block; else it cannot."""
        if start not in self._usable:
            try:
                self._usable[start] = torch.equal(self.run(start, 0), self.outputs[0])
            except Exception:  # whatever a network makes of blocks that do nothing
                self._usable[start] = False
        return self._usable[start]

    @contextmanager
    def _skipping(self, start: int, number: int) -> Iterator[None]:
        skipped = self._blocks[:start]
        for block in skipped:
            kept = self._kept[number][block]
            block.forward = lambda *_, kept=kept, **__: tree_map_only(Tensor, torch.clone, kept)
        try:
            yield
        finally:
            for block in skipped:
                del block.forward
