"""What `task.score` names: three ways to score groups of layers, each on samples of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from typing_extensions import override

from qexp.config.recipe import format_name
from qexp.sensitivity.blocks import call
from qexp.sensitivity.exact import score_exactly
from qexp.sensitivity.final import UNIT, FinalErrors
from qexp.sensitivity.gradient import passes_of, score_by_gradient
from qexp.sensitivity.groups import ComponentGroups
from qexp.sensitivity.partial import PartialScores, Scores
from qexp.sensitivity.samples import Calibration, read_text, read_trajectory

if TYPE_CHECKING:
    from qexp.tasks.context import RunContext


class Scorer(ABC):
    """calibration: the samples, and what scores mean."""

    calibration: Calibration

    def __init__(self, context: RunContext) -> None:
        self._context, self._task = context, context.task

    def passes(self, component: str) -> int:
        """Return in how many parts the scores of a group come."""
        return 1

    @abstractmethod
    def score(self, component: str, groups: ComponentGroups, partial: PartialScores) -> dict[str, Scores]:
        """Return the scores of all groups of a component; each part is kept in `partial` as it comes."""

    @abstractmethod
    def run(self, component: str) -> None:
        """Have a component answer the samples."""

    @property
    def _base(self) -> str | None:
        return format_name(self._task.base) if self._task.base is not None else None


class ByOutput(Scorer):
    """task.score=exact: the error of the network's output for calls of the samples."""

    def __init__(self, context: RunContext, groups: Mapping[str, ComponentGroups]) -> None:
        super().__init__(context)
        is_text = context.source.modality == "text"
        self.calibration = read_text(context) if is_text else read_trajectory(context, list(groups))

    @override
    def score(self, component: str, groups: ComponentGroups, partial: PartialScores) -> dict[str, Scores]:
        model, batches = self._context.models[component], self.calibration.batches[component]
        error, lists = self.calibration.error, groups.block_lists
        return score_exactly(component, model, groups, batches, error, lists, partial, self._base)

    @override
    def run(self, component: str) -> None:
        for batch in self.calibration.batches[component]:
            call(self._context.models[component], batch)


class ByGradient(ByOutput):
    """task.score=gradient: the same, estimated."""

    def __init__(self, context: RunContext, groups: Mapping[str, ComponentGroups]) -> None:
        super().__init__(context, groups)
        calls = self.calibration.batches.items()
        self._passes = {name: passes_of(context.models[name], own, self._task.projections) for name, own in calls}

    @override
    def passes(self, component: str) -> int:
        return len(self._passes[component])

    @override
    def score(self, component: str, groups: ComponentGroups, partial: PartialScores) -> dict[str, Scores]:
        model, passes, error = self._context.models[component], self._passes[component], self.calibration.error
        lists = groups.block_lists
        return score_by_gradient(component, model, groups, passes, self._task.projections, error, lists, partial)


class ByFinal(Scorer):
    """task.score=final: the error of the samples at the end."""

    def __init__(self, context: RunContext, groups: Mapping[str, ComponentGroups]) -> None:
        super().__init__(context)
        self._final = FinalErrors(context, groups)
        self.calibration = Calibration({}, "squared_error", UNIT, self._final.samples)

    @override
    def score(self, component: str, groups: ComponentGroups, partial: PartialScores) -> dict[str, Scores]:
        return self._final.score(component, partial, self._base)

    @override
    def run(self, component: str) -> None:
        self._final.generate()


MakeScorer = Callable[["RunContext", Mapping[str, ComponentGroups]], Scorer]
SCORERS: dict[str, MakeScorer] = {"exact": ByOutput, "gradient": ByGradient, "final": ByFinal}
