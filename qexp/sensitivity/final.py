"""Scores by the end of a trajectory: one group is quantized at a time, and the samples are generated to the end.

This is what the error of the network's output at single steps estimates (`exact.py`), at the price of all steps: how
errors of different steps add up, and what later steps make of them, is measured and not assumed.

Samples differ in how easily they change. A mean of squared errors would be that of a few of them; each counts by its
error over E, its error with all layers in one format (the geometric mean over formats). Times the geometric mean of E
this is a squared error of the final latents, near its geometric mean over samples, which the mean PSNR follows.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qexp.errors import ConfigError
from qexp.sensitivity.candidates import weight_of
from qexp.sensitivity.exact import all_in_format, score_each
from qexp.sensitivity.groups import ComponentGroups, Group
from qexp.sensitivity.partial import PartialScores, Scores
from qexp.sensitivity.samples import IMAGES, generate_latents

if TYPE_CHECKING:
    from qexp.tasks.context import RunContext

UNIT = "squared error of the final latents, near its geometric mean over the samples"


class FinalErrors:
    """The error of the samples at the end. Raises: ConfigError for a model whose samples are not finite."""

    def __init__(self, context: RunContext, groups: Mapping[str, ComponentGroups]) -> None:
        self._context, self._groups = context, groups
        self._sampling = context.source.limit_samples(context.task.sampling(), context.task.samples or IMAGES)
        self._expected = self.generate()
        if not bool(self._expected.isfinite().all()):
            raise ConfigError("the unquantized model's samples are not finite in fp32; no score: repair the checkpoint")
        self._weights = self._weights_of_samples()

    @property
    def samples(self) -> int:
        return len(self._expected)

    def generate(self) -> Tensor:
        """Generate the samples with the weights as they are now; returns their final latents, [samples, ...]."""
        return generate_latents(self._context, self._sampling)

    def score(self, component: str, partial: PartialScores, base: str | None) -> dict[str, Scores]:
        """Return the scores of all groups of a component; each is kept in `partial` as it comes.

        base: a format in which the layers of all components are meanwhile.
        """

        def error_of(group: Group) -> float:
            return float((self._errors() * self._weights).sum())

        models = self._context.models
        with ExitStack() as stack:
            for name, own in self._groups.items():
                if base is not None and name != component:
                    stack.enter_context(all_in_format(models[name], own, base))
            return score_each(component, models[component], self._groups[component], lambda: error_of, partial, base)

    def _errors(self) -> Tensor:
        """Return the mean squared error of each sample's latents, with the weights as they are now: [samples], fp64."""
        return (self.generate().double() - self._expected.double()).square().flatten(1).mean(1)

    def _weights_of_samples(self) -> Tensor:
        """Return what a sample's error counts: [samples]; 0 for one that no format changes.

        Raises: ConfigError for a component that the latents do not depend on.
        """
        found = torch.stack([errors for component in self._groups for errors in self._errors_in_formats(component)])
        is_usable = found.isfinite() & (found > 0)
        counts = is_usable.sum(0)
        logs = torch.where(is_usable, found.log(), 0.0).sum(0) / counts.clamp(min=1)  # of the geometric mean
        changed = counts > 0
        if not bool(changed.any()):  # every format has the very weights that are there
            return torch.full((self.samples,), 1 / self.samples, dtype=torch.float64)
        mean = logs[changed].mean()
        return torch.where(changed, (mean - logs).exp(), 0.0) / changed.sum()

    def _errors_in_formats(self, component: str) -> list[Tensor]:
        """Return the errors with all layers of a component in each of its formats."""
        model, own, found = self._context.models[component], self._groups[component], []
        is_same = True
        for name in own.formats:
            dense = {layer: weight_of(model, layer) for layer in own.layers}
            with all_in_format(model, own, name):
                is_same &= all(torch.equal(weight_of(model, layer), weight) for layer, weight in dense.items())
                found.append(self._errors())
        if not is_same and not any(bool(errors.any()) for errors in found):
            raise ConfigError(
                f"the final latents do not depend on '{component}', so that its formats cannot be scored by them; "
                "leave it out of model.quantize"
            )
        return found
