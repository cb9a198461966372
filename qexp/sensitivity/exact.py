"""Exact scores: one group of layers is quantized at a time, and the error of the model measured.

With a base, all other groups are in that format meanwhile: a score is then what the format adds to the error where the
rest is quantized, too. Where errors are too large to add up from the dense network, they do so around such a base.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

from torch import Tensor, nn

from qexp.errors import ConfigError
from qexp.sensitivity.blocks import Tail, blocks_of, call, order_of_calls
from qexp.sensitivity.candidates import candidate_weight, weight_of, weights_in_place
from qexp.sensitivity.errors import output_error
from qexp.sensitivity.groups import ComponentGroups, Group
from qexp.sensitivity.partial import PartialScores, Scores
from qexp.sensitivity.samples import Batch
from qexp.sensitivity.table import DENSE

ErrorOf = Callable[[Group], float]  # of the model as its weights are now, some of which are this group's in a format


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
    """Score all groups by the error of the network's output for some calls. error: "squared_error" or "kl"."""
    expected = [call(model, batch) for batch in batches]

    def begin() -> ErrorOf:
        blocks, starts = order_of_calls(model, blocks_of(model, block_lists), groups.layers, batches[0])
        tail = Tail(model, blocks, batches)
        usable = {start: start if tail.check(start) else 0 for start in {0, *starts.values()}}

        def error_of(group: Group) -> float:
            start = usable[min(starts.get(layer, 0) for layer in group.layers)]
            return sum(
                output_error(error, expected[number], tail.run(start, number), batch.weights)
                for number, batch in enumerate(batches)
            )

        return error_of

    return score_each(component, model, groups, begin, partial, base)


def score_each(
    component: str,
    model: nn.Module,
    groups: ComponentGroups,
    begin: Callable[[], ErrorOf],
    partial: PartialScores,
    base: str | None = None,
) -> dict[str, Scores]:
    """Return the scores of all groups; each is kept in `partial` as it comes.

    begin: called when the base is in place; returns what measures the error. Raises: ConfigError for a base that no
    layer can be in, and for an error that is not finite.
    """
    if base is not None and base not in groups.formats:
        raise ConfigError(f"task.base: no layer of '{component}' can be in {base}; give another one")
    left = [group for group in groups.groups if (component, group.name) not in partial.done]
    dense = {layer: weight_of(model, layer) for layer in groups.layers}
    with all_in_format(model, groups, base) if base is not None else nullcontext():
        error_of = begin()
        for group in left:
            errors = {}
            for name in group.formats if base is None else group.nbytes:
                with weights_in_place(model, _weights_in(dense, groups, group, name)):
                    errors[name] = error_of(group)
                if not math.isfinite(errors[name]):
                    raise ConfigError(
                        f"with '{group.name}' of '{component}' in {name} the output is not finite; leave {name} out of "
                        f"task.formats, or add '{group.name}' to skip_modules"
                    )
            partial.add(component, group.name, _above_dense(errors, group.formats))
    return {group.name: partial.done[component, group.name] for group in groups.groups}


@contextmanager
def all_in_format(model: nn.Module, groups: ComponentGroups, name: str) -> Iterator[None]:
    """Have all groups that can be in a format compute in it."""
    dense = {layer: weight_of(model, layer) for layer in groups.layers}
    own = [_weights_in(dense, groups, group, name) for group in groups.groups if name in group.formats]
    with weights_in_place(model, {layer: weight for weights in own for layer, weight in weights.items()}):
        yield


def _weights_in(dense: Mapping[str, Tensor], groups: ComponentGroups, group: Group, name: str) -> Mapping[str, Tensor]:
    if name == DENSE:
        return {layer: dense[layer] for layer in group.layers}
    return {layer: candidate_weight(dense[layer], layer, groups.formats[name]) for layer in group.layers}


def _above_dense(errors: Mapping[str, float], names: Sequence[str]) -> Scores:
    """Return what each format adds to the error that there is with the group dense: by noise it may be below."""
    least = errors.get(DENSE, 0.0)
    return {name: max(errors[name] - least, 0.0) for name in names}
