"""Scores by the end of a trajectory: one group is quantized at a time, and the samples are generated to the end.

This is what the error of the network's output at single steps estimates (`exact.py`), at the price of all steps: how
errors of different steps add up, and what later steps make of them, is measured and not assumed.

Samples differ in how easily they change. A mean of squared errors would be that of a few of them; each counts by its
error over E, its error with all layers in one format (the geometric mean over formats). Times the geometric mean of E
this is a squared error of the final latents, near its geometric mean over samples, which the mean PSNR follows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qexp.errors import ConfigError
from qexp.sensitivity.exact import all_in_format, score_each
from qexp.sensitivity.groups import ComponentGroups, Group
from qexp.sensitivity.partial import PartialScores, Scores
from qexp.sensitivity.samples import IMAGES, generate_latents

if TYPE_CHECKING:
    from qexp.tasks.context import RunContext

UNIT = "squared error of the final latents, near its geometric mean over the samples"


class FinalErrors:
    """The error of the samples at the end."""

    def __init__(self, context: RunContext, groups: Mapping[str, ComponentGroups]) -> None:
        self._context = context
        self._sampling = context.source.limit_samples(context.task.sampling(), context.task.samples or IMAGES)
        self._expected = self.generate()
        self._weights = self._weights_of_samples(groups)

    @property
    def samples(self) -> int:
        return len(self._expected)

    def generate(self) -> Tensor:
        """Generate the samples with the weights as they are now; returns their final latents, [samples, ...]."""
        return generate_latents(self._context, self._sampling)

    def score(
        self, component: str, groups: ComponentGroups, partial: PartialScores, base: str | None
    ) -> dict[str, Scores]:
        """Return the scores of all groups of a component; each is kept in `partial` as it comes."""

        def error_of(group: Group) -> float:
            return float((self._errors() * self._weights).sum())

        return score_each(component, self._context.models[component], groups, lambda: error_of, partial, base)

    def _errors(self) -> Tensor:
        """Return the mean squared error of each sample's latents, with the weights as they are now: [samples], fp64."""
        return (self.generate().double() - self._expected.double()).square().flatten(1).mean(1)

    def _weights_of_samples(self, groups: Mapping[str, ComponentGroups]) -> Tensor:
        """Return what a sample's error counts: [samples]. Raises ConfigError for components that change no sample."""
        logs: list[Tensor] = []
        for component, own in groups.items():
            found = []
            for name in own.formats:
                with all_in_format(self._context.models[component], own, name):
                    found.append(self._errors())
            if not any(bool(errors.any()) for errors in found):
                raise ConfigError(
                    f"no format of '{component}' changes the samples, so that nothing can be scored; leave it out of "
                    "model.quantize"
                )
            logs += [errors.log() for errors in found if bool(errors.all())]
        if not logs:  # some sample never changes
            return torch.full((self.samples,), 1 / self.samples, dtype=torch.float64)
        typical = torch.stack(logs).mean(0)
        return (typical.mean() - typical).exp() / self.samples
