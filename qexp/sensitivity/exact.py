"""Exact scores: one group of layers is quantized at a time, and the error of the network's output measured."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from qexp.sensitivity.blocks import Tail, blocks_of, order_of_calls
from qexp.sensitivity.candidates import candidate_weight, weights_in_place
from qexp.sensitivity.errors import output_error
from qexp.sensitivity.groups import ComponentGroups
from qexp.sensitivity.partial import PartialScores, Scores
from qexp.sensitivity.samples import Batch


def score_exactly(
    component: str,
    model: nn.Module,
    groups: ComponentGroups,
    batches: Sequence[Batch],
    error: str,
    block_lists: Sequence[str],
    partial: PartialScores,
) -> dict[str, Scores]:
    """Return the scores of all groups; each is kept in `partial` as it comes. error: "squared_error" or "kl"."""
    left = [group for group in groups.groups if (component, group.name) not in partial.done]
    blocks, starts = order_of_calls(model, blocks_of(model, block_lists), groups.layers, batches[0])
    tail = Tail(model, blocks, batches)
    for group in left:
        start = min(starts.get(layer, 0) for layer in group.layers)
        start = start if tail.check(start) else 0
        scores = {}
        for name in group.formats:
            one = groups.formats[name]
            weights = {layer: candidate_weight(model, layer, one) for layer in group.layers}
            with weights_in_place(model, weights):
                scores[name] = sum(
                    output_error(error, tail.outputs[number], tail.run(start, number), batch.weights)
                    for number, batch in enumerate(batches)
                )
        partial.add(component, group.name, scores)
    return {group.name: partial.done[component, group.name] for group in groups.groups}
