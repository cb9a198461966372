"""The metrics: a file of this package that binds METRICS declares one, or a family with one formula.

The file is the registry. Scoring, the table, the plots, results.csv, report.md, Weights & Biases, `rerun` and the list
in outputs/README.md read what is declared here. Importing a metric's file imports no torch: formulas do, when called.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cache, cached_property
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from qexp.metrics.tensors import Comparison

GROUPS = ("memory", "load", "time", "quality", "roundtrip", "offload")  # in the order of columns
MODEL_TASKS = ("generate", "perplexity", "forward", "lm_eval")  # tasks that run a model
TASKS = (*MODEL_TASKS, "roundtrip", "sensitivity")
SAMPLE_KINDS = (
    "images",
    "prompts",
    "tokens",
    "documents",
)  # what metrics are means over; of layers, layers.csv has the values
DECLARES = re.compile(r"^METRICS\b", re.MULTILINE)


@dataclass(frozen=True)
class Result:
    """value: None where it is undefined. samples: the values whose mean it is (`Metric.of_mean`), one for each image,
    prompt or token; None where one is undefined, infinite where nothing differs from the reference. also: further
    metrics of the same file that the formula gives."""

    value: float | None
    samples: Sequence[float | None] | None = None
    also: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Samples:
    """The saved outputs of a run that metrics are computed from, and those of its reference.

    Images are those that neither side's safety checker replaced.

    Args:
        outputs: of the run, by name.
        expected: of the reference; None without one.
        pairs: (reference, run), the tensors that are compared element by element; none for text.
        is_complete: whether nothing was left out of the comparison.
        is_comparable: whether every value of both sides is finite.
        prompts: the prompts of images, those of one prompt following one another; None without prompts.
        own_scores: computes the metrics that the model source defines.
        own_samples: computes the values whose means some of these are.
        names: of the samples, by what they are ('images', 'prompts', 'tokens'), one for each value of `Result.samples`.
            Values with one name are of one sample: the tokens of a window, the frames of a video.
        tools: loads what a formula needs beside the outputs (a network, log-probabilities), by name.
    """

    outputs: Mapping[str, Tensor]
    expected: Mapping[str, Tensor] | None = None
    pairs: Sequence[tuple[Tensor, Tensor]] = ()
    is_complete: bool = True
    is_comparable: bool = True
    prompts: Sequence[str] | None = None
    own_scores: Callable[[], Mapping[str, float | None]] = dict
    own_samples: Callable[[], Mapping[str, Sequence[float | None]]] = dict
    names: Mapping[str, Sequence[str]] = field(default_factory=dict)
    tools: Mapping[str, Callable[[], Any]] = field(default_factory=dict)

    @cached_property
    def comparison(self) -> Comparison:
        """The error over all elements of all pairs. Without an element there is nothing to compare."""
        from qexp.metrics.tensors import Comparison, compare_all

        if not self.is_complete and not any(len(reference) for reference, _ in self.pairs):
            return Comparison(exact=False, finite=False)
        return compare_all(self.pairs)

    def holds(self, name: str) -> bool:
        """Return whether the outputs have this tensor; 'pairs': whether there is something to compare."""
        return bool(self.pairs) if name == "pairs" else name in self.outputs


@dataclass(frozen=True)
class Metric:
    """One number of result.json.

    Args:
        name: group/name_unit; a * stands for a part that depends on the run.
        meaning: for the documentation.
        header: of its column in tables; '' for a metric that is in result.json and results.csv alone.
        unit: GiB is shown in KiB, MiB or GiB, by the size of a column's values.
        better: which direction is better, '' if neither is.
        range: the least and the greatest value.
        tasks: the tasks that it is of.
        mean_over: the samples that it is a mean over; group/<that> is their number.
        of_mean: 'exp' where it is the exponential of their mean.
        set_of: the samples whose number changes its value, so that only values with the same n can be compared.
        digits: format of a value in tables.
        varies: whether it differs between runs of the same experiment on the same machine.
        is_of_process: whether it is about the memory of the whole process.
        order: of its column within the group, lowest first.
        axis: its name on a plot against memory; '' for a metric that is not plotted.
        brief: how the line at the end of an experiment shows it; of several metrics, the one with the lowest order.
        needs: outputs without which it does not exist; `pairs` is anything that is compared element by element.
        compares: whether it needs a reference.
        compute: the formula; None for what is measured while the experiment runs.
        is_chosen: whether metrics.names lists it.
        setting: the field of `metrics` that changes its value; such a metric is computed only where it is asked for.
        hidden_by: a metric that says the same better; where there is one, the column is empty.
        infinite_if: (metric, what it is equal to, a number or a metric) where null stands for infinity.
        is_minor: whether its column is left out where there is no room.
    """

    name: str
    meaning: str
    header: str = ""
    unit: str = ""
    better: Literal["higher", "lower", ""] = ""
    range: tuple[float, float] = (-inf, inf)
    tasks: tuple[str, ...] = TASKS
    mean_over: str = ""
    of_mean: Literal["", "exp"] = ""
    set_of: str = ""
    digits: str = ".2f"
    varies: bool = False
    is_of_process: bool = False
    order: int = 100
    axis: str = ""
    brief: str = ""
    needs: tuple[str, ...] = ()
    compares: bool = False
    compute: Callable[[Samples], Result | float | None] | None = None
    is_chosen: bool = True
    setting: str | None = None
    hidden_by: str = ""
    infinite_if: tuple[str, str | int] | None = None
    is_minor: bool = False

    @property
    def group(self) -> str:
        return self.name.partition("/")[0]

    @property
    def short_name(self) -> str:
        return self.name.partition("/")[2]

    @property
    def sample_kind(self) -> str:
        """What its samples are: 'images', 'prompts' or 'tokens'; '' for a metric that is no mean over such."""
        kind = "images" if self.mean_over == "differing_images" else self.mean_over
        return kind if kind in SAMPLE_KINDS else ""

    @property
    def count_name(self) -> str | None:
        """The metric that holds the number of samples; None for documents, whose number is a metric of each task."""
        if self.mean_over == "documents":
            return None
        samples = self.mean_over or self.set_of
        return f"{self.group}/{samples}" if samples else None


@cache
def all_metrics() -> dict[str, Metric]:
    """Return every declared metric by its name, in the order of columns.

    Raises: ValueError for two with one name, or of an unknown group.
    """
    found = sorted(_declared(), key=lambda metric: (GROUPS.index(metric.group), metric.order))
    by_name = {metric.name: metric for metric in found}
    if len(by_name) < len(found):
        raise ValueError(f"a metric is declared twice, of {[metric.name for metric in found]}")
    return by_name


def _declared() -> Iterator[Metric]:
    package = importlib.import_module(__package__)
    for path in sorted(path for folder in package.__path__ for path in Path(folder).glob("*.py")):
        if DECLARES.search(path.read_text(encoding="utf-8")):
            yield from importlib.import_module(f"{__package__}.{path.stem}").METRICS


def find_metric(name: str) -> Metric | None:
    """Return the declaration of a metric in a result, None if it has none."""
    known = all_metrics()
    return known.get(name) or next((known[one] for one in known if "*" in one and fnmatchcase(name, one)), None)


def metrics_in(names: Iterable[str]) -> list[Metric]:
    """Return the declared metrics in the order of columns, a family (with a *) as those of its metrics in `names`."""
    members: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        if (found := find_metric(name)) is not None and "*" in found.name:
            members.setdefault(found.name, []).append(name)
    expanded: list[Metric] = []
    for metric in all_metrics().values():
        names_of_it = sorted(members.get(metric.name, ())) if "*" in metric.name else [metric.name]
        expanded += [member_of(metric, name) for name in names_of_it]
    return expanded


def member_of(family: Metric, name: str) -> Metric:
    """Return the metric of a family (with a *) that has this name, and it in its header; any other metric as it is."""
    if "*" not in family.name:
        return family
    part = name.removeprefix(family.name.partition("*")[0]).replace("_", " ")
    return replace(family, name=name, header=family.header.replace("*", part))


def chosen_metrics() -> dict[str, Metric]:
    """Return the metrics that `metrics.names` may list, by their short names."""
    return {metric.short_name: metric for metric in all_metrics().values() if metric.compute and metric.is_chosen}


def metric_order(name: str) -> tuple[int, str]:
    """Return the sort key of a metric in a result: declared order, and undeclared ones at the end."""
    metric = find_metric(name)
    return ([*all_metrics()].index(metric.name) if metric else len(all_metrics()), name)


def is_infinite(metrics: Mapping[str, float | None], metric: Metric) -> bool:
    """Return whether a value is null because it is infinite: nothing differs from the original."""
    if metric.infinite_if is None or metric.name not in metrics or metrics[metric.name] is not None:
        return False
    sign, expected = metric.infinite_if
    value = metrics.get(expected) if isinstance(expected, str) else expected
    return value not in (None, 0) and metrics.get(sign) == value
