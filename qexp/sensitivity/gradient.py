"""Scores of all formats of all groups from a few backward passes, by Gaussian projections of the output.

A small change dW of a layer's weight moves the output by J dW. For a random v with covariance M (`errors.py`),
E[(v^T J dW)^2] = (J dW)^T M (J dW), the error that exact scores measure, to second order. v^T J is the gradient of
v^T y: for one row of the output, with the layer's input x and the gradient g of its output, v^T J dW = <g, x dW^T>,
summed over tokens. So a backward pass gives every format of every layer one sample for each row.

Blocks are computed again in the backward pass (`recomputation.py`), so that activations of one block are in memory, and
the inputs of the others; of blocks that rest on disk also the weights of one or two. The cost of the passes does not
depend on how many formats there are. Groups of several layers are summed before they are squared.

Source: arXiv:2106.08295, section 3 (errors of weights to second order).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from qexp.errors import ConfigError
from qexp.sensitivity.blocks import blocks_of
from qexp.sensitivity.candidates import restored_rows, weight_of
from qexp.sensitivity.errors import draw_projection
from qexp.sensitivity.groups import ComponentGroups, Format, Group
from qexp.sensitivity.partial import PartialScores, Scores
from qexp.sensitivity.recomputation import recomputed
from qexp.sensitivity.samples import Batch, first_tensor, merge_calls
from qexp.system.machine_load import usable_threads
from qexp.system.memory import release_freed_memory

GRADIENTS_BYTES = 8 << 20  # of weight gradients at a time: as much as stays in a processor's cache
CHANGES_BYTES = 32 << 20  # of changes of weights, in all formats, at a time, for each core


def passes_of(model: nn.Module, batches: Sequence[Batch], projections: int) -> list[Batch]:
    """Return the calls to go through: each batch so many times, at once where the network can answer that."""
    return [one for batch in batches for one in merge_calls(model, [batch] * projections)]


def score_by_gradient(
    component: str,
    model: nn.Module,
    groups: ComponentGroups,
    passes: Sequence[Batch],
    projections: int,
    error: str,
    block_lists: Sequence[str],
    partial: PartialScores,
) -> dict[str, Scores]:
    """Return the scores of all groups; parts of them, of one pass each, are kept in `partial` as they come."""
    blocks = blocks_of(model, block_lists)
    for number, batch in enumerate(passes):
        keys = {group.layers: part_name(group, number) for group in groups.groups}
        left = [group for group in groups.groups if (component, keys[group.layers]) not in partial.done]
        if left:
            random = torch.Generator().manual_seed(number)
            release_freed_memory()  # what the forward passes before left behind
            with _Backward(model, groups, left, len(batch.weights)) as backward:
                backward.on_done = lambda group, scores, keys=keys: partial.add(component, keys[group.layers], scores)
                backward.run(batch, blocks, error, random)
    scores: dict[str, Scores] = {}
    for group in groups.groups:
        parts = [partial.done[component, part_name(group, number)] for number in range(len(passes))]
        scores[group.name] = {name: sum(part[name] for part in parts) / projections for name in group.formats}
    return scores


def part_name(group: Group, number: int) -> str:
    """Return the name by which a pass's part of a group's scores is kept."""
    return f"{group.name} of pass {number + 1}"


class _Backward:
    """One backward pass, in which every layer of some groups meets its input and the gradient of its output."""

    on_done: Any

    def __init__(self, model: nn.Module, groups: ComponentGroups, left: Sequence[Group], rows: int) -> None:
        self._model, self._groups, self._rows = model, groups, rows
        self._group_of = {layer: group for group in left for layer in group.layers}
        self._calls: Counter[str] = Counter()  # of the layers of a group, in the forward pass, without an answer yet
        self._sums: dict[str, Tensor] = {}  # name of a group -> [rows, formats]
        self._is_forward = True
        self._left = {group.name: group for group in left}
        self._handles: list[Any] = []
        self._threads = torch.get_num_threads()
        # of these threads: they are the parallelism
        self._pool = ThreadPoolExecutor(usable_threads(), initializer=lambda: torch.set_num_threads(1))

    def __enter__(self) -> _Backward:
        modules: dict[nn.Module, str] = {}
        for layer in self._group_of:
            modules.setdefault(self._model.get_submodule(layer), layer)  # a module under two names is called once
        for module, layer in modules.items():
            self._handles.append(module.register_forward_hook(self._hook(layer)))
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
        torch.set_num_threads(self._threads)  # what they set is also the default of threads to come
        for handle in self._handles:
            handle.remove()

    def run(self, batch: Batch, blocks: Sequence[nn.Module], error: str, random: torch.Generator) -> None:
        with torch.enable_grad(), recomputed(self._model, blocks):
            output = first_tensor(self._model(*batch.args, **batch.kwargs))
            self._is_forward = False
            if not output.requires_grad:
                raise ConfigError(
                    f"no gradient passes through {type(self._model).__name__}; use task.score=exact, which needs none"
                )
            projected = _Projected.apply(output, lambda own: draw_projection(error, own, batch.weights, random))
            del output  # logits are as large as their projection; both are let go on the way back
            release_freed_memory()  # the last block's activations
            projected.backward()
        for group in list(self._left.values()):  # some layer of it has no part in the output
            self._finish(group)

    def _hook(self, layer: str) -> Any:
        group = self._group_of[layer]

        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            if self._is_forward:
                self._calls[group.name] += 1
            if not torch.is_grad_enabled():
                return None  # within a block, which is computed again
            is_first = not output.requires_grad
            if is_first:
                output = output.detach().requires_grad_()
            input = args[0].detach()
            output.register_hook(lambda gradient: self._meet(layer, input, gradient))
            return output.clone() if is_first else None

        return hook

    def _meet(self, layer: str, input: Tensor, gradient: Tensor) -> None:
        group = self._group_of[layer]
        with torch.no_grad():
            found = self._products(layer, group.formats, input, gradient.detach())
        before = self._sums.get(group.name)
        if before is not None and before.shape != found.shape:  # of layers that see rows apart, and together
            before, found = before.sum(0, keepdim=True), found.sum(0, keepdim=True)
        self._sums[group.name] = found if before is None else before + found
        self._calls[group.name] -= 1
        if self._calls[group.name] == 0:
            self._finish(group)

    def _finish(self, group: Group) -> None:
        """Square what was summed. A group that has no part in the output costs nothing."""
        del self._left[group.name]
        sums = self._sums.pop(group.name, None)
        squares = [0.0] * len(group.formats) if sums is None else sums.double().square().sum(0).tolist()
        self.on_done(group, dict(zip(group.formats, squares, strict=True)))

    def _products(self, layer: str, names: Sequence[str], input: Tensor, gradient: Tensor) -> Tensor:
        """Return <g, x dW^T> of each row and format, [rows, formats].

        Rows that cannot be told apart (tokens that a network has picked) are one: its square has the same mean.
        """
        x, g = self._by_rows(input), self._by_rows(gradient)  # [rows, tokens, in], [rows, tokens, out]
        formats = [self._groups.formats[name] for name in names]
        specs = [one.chosen[layer] for one in formats]
        dense = weight_of(self._model, layer)
        if specs[0].transposed:
            dense = dense.t()

        def sum_part(numbers: Sequence[int], rows: slice) -> Tensor:
            part = dense[rows].detach()
            changes = part.new_empty(len(numbers), *part.shape, dtype=torch.float32)
            for number, change in zip(numbers, changes, strict=True):
                torch.sub(restored_rows(part, specs[number], formats[number]), part, out=change)
            return _sum_products(x, g[..., rows], changes)

        found = x.new_zeros(len(x), len(formats))
        parts = list(_parts(formats, dense))
        is_small = all(formats[number].quantizer.rows_alone for numbers, _ in parts for number in numbers)
        # whole weights come one after another: several at a time may not fit
        each = self._pool.map if is_small and dense.device.type == "cpu" else map
        for (numbers, _), sums in zip(parts, each(sum_part, *zip(*parts, strict=True)), strict=True):
            found[:, numbers] += sums
        return found

    def _by_rows(self, tensor: Tensor) -> Tensor:
        count = tensor.numel() // tensor.shape[-1]
        rows = self._rows if count % self._rows == 0 else 1
        return tensor.reshape(rows, -1, tensor.shape[-1]).float()


class _Projected(torch.autograd.Function):
    """A number whose gradient with respect to the output is a projection, drawn when it is asked for."""

    @staticmethod
    @override
    def forward(ctx: Any, output: Tensor, draw: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.draw = draw
        ctx.save_for_backward(output)
        return output.new_zeros(())

    @staticmethod
    @override
    def backward(ctx: Any, _: Tensor) -> Any:
        (output,) = ctx.saved_tensors
        return ctx.draw(output.detach()), None


def _parts(formats: Sequence[Format], dense: Tensor) -> Iterator[tuple[list[int], slice]]:
    """Yield formats, by number, and rows of a weight [out, in] whose changes are in memory at a time.

    The gradient of a part is computed once for all formats, but for those that need the whole weight, which may be too
    many for that.
    """
    alone = [number for number, one in enumerate(formats) if one.quantizer.rows_alone]
    whole = [number for number, one in enumerate(formats) if not one.quantizer.rows_alone]
    rows, columns = dense.shape
    step = max(CHANGES_BYTES // (4 * columns * max(len(alone), 1)), 1)
    if alone:
        yield from ((alone, slice(start, min(start + step, rows))) for start in range(0, rows, step))
    count = max(CHANGES_BYTES // (4 * rows * columns), 1)
    yield from ((whole[start : start + count], slice(0, rows)) for start in range(0, len(whole), count))


def _sum_products(x: Tensor, g: Tensor, changes: Tensor) -> Tensor:
    """Return <g^T x, change> of each row and change, [rows, formats]; x: [rows, tokens, in], g: [rows, tokens, out],
    changes: [formats, out, in]."""
    found = x.new_zeros(len(x), len(changes))
    step = max(GRADIENTS_BYTES // (4 * len(x) * x.shape[-1]), 1)
    for own_g, own_changes in zip(g.split(step, dim=-1), changes.split(step, dim=1), strict=True):
        found += torch.bmm(own_g.mT, x).flatten(1) @ own_changes.flatten(1).T
    return found
