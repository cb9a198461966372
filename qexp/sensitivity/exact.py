"""Exact scores: one group of layers is quantized at a time, and the error of the network's output measured.

With a base, all other groups are in that format meanwhile: a score is then what the format adds to the error where the
rest is quantized, too. Where errors are too large to add up from the dense network, they do so around such a base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from torch import Tensor, nn

from qexp.sensitivity.blocks import Tail, blocks_of, call, order_of_calls
from qexp.sensitivity.candidates import candidate_weight, weight_of, weights_in_place
from qexp.sensitivity.errors import output_error
from qexp.sensitivity.groups import ComponentGroups, Group
from qexp.sensitivity.partial import PartialScores, Scores
from qexp.sensitivity.samples import Batch
from qexp.sensitivity.table import DENSE


def score_exactly(
    component: str,
    model: nn.Module,
    groups: ComponentGroups,
    batches: Sequence[Batch],
    error: str,
    block_lists: Sequence[str],
    partial: PartialScores,
    base: str | None = None,
) -> dict[str, Scores]:
    """Return the scores of all groups; each is kept in `partial` as it comes. error: "squared_error" or "kl"."""
    left = [group for group in groups.groups if (component, group.name) not in partial.done]
    expected = [call(model, batch) for batch in batches]
    dense = {layer: weight_of(model, layer) for layer in groups.layers}

    def weights_in(group: Group, name: str) -> Mapping[str, Tensor]:
        if name == DENSE:
            return {layer: dense[layer] for layer in group.layers}
        return {layer: candidate_weight(dense[layer], layer, groups.formats[name]) for layer in group.layers}

    with ExitStack() as stack:
        for group in groups.groups if base is not None else ():
            if base in group.formats:
                stack.enter_context(weights_in_place(model, weights_in(group, base)))
        blocks, starts = order_of_calls(model, blocks_of(model, block_lists), groups.layers, batches[0])
        tail = Tail(model, blocks, batches)
        for group in left:
            start = min(starts.get(layer, 0) for layer in group.layers)
            start = start if tail.check(start) else 0
            errors = {}
            for name in group.formats if base is None else group.nbytes:
                with weights_in_place(model, weights_in(group, name)):
                    errors[name] = sum(
                        output_error(error, expected[number], tail.run(start, number), batch.weights)
                        for number, batch in enumerate(batches)
                    )
            partial.add(component, group.name, _above_dense(errors, group.formats))
    return {group.name: partial.done[component, group.name] for group in groups.groups}


def _above_dense(errors: Mapping[str, float], names: Sequence[str]) -> Scores:
    """Return what each format adds to the error that there is with the group dense: by noise it may be below."""
    least = errors.get(DENSE, 0.0)
    return {name: max(errors[name] - least, 0.0) for name in names}
