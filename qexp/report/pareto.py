"""The points of a plot of memory of the weights against quality, and its Pareto front.

A point is on the front if no other one has less memory and at least its quality, or the same memory and more quality.
Experiments that share a point (the strategies of offloading move weights and change no answer) are one point, and so
are those that differ in their seed alone. What is identical to its reference has an infinite ratio. `pareto_plot.py`
draws them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from qexp.metrics.registry import Metric, all_metrics, is_infinite
from qexp.report.table import prepare
from qexp.results.labels import SEPARATOR, backend_family
from qexp.results.rows import Row
from qexp.results.uncertainty import Interval
from qexp.system.files import to_csv

MEMORY = "memory/weights_gib"


@dataclass(frozen=True)
class Point:
    """quality is infinite for what is identical; names and offloads are of the experiments that share the point."""

    memory_gib: float
    quality: float
    names: tuple[str, ...]
    offloads: tuple[str, ...]
    family: str  # of its color: the libraries that quantized
    spread: float = 0.0  # standard deviation of the quality over seeds
    interval: Interval | None = None  # of the quality, 95 %

    @property
    def bar(self) -> Interval | None:
        """Ends of its error bar: the interval, or one standard deviation over seeds."""
        if self.interval is None and self.spread:
            return self.quality - self.spread, self.quality + self.spread
        return self.interval

    @property
    def bar_kind(self) -> str:
        """Return what the bar is; '' without one."""
        if self.interval is not None:
            return "95 % interval"
        return "standard deviation over seeds" if self.spread else ""

    def label(self, common_offloads: tuple[str, ...]) -> str:
        """Return the names; and the offload strategies, unless they are the same at every point."""
        name = " / ".join(self.names)
        return name if self.offloads == common_offloads else f"{name} ({', '.join(self.offloads)})"


def plotted_metrics() -> list[Metric]:
    """Return the metrics that are plotted against memory, each in a plot of its own."""
    return [metric for metric in all_metrics().values() if metric.axis and metric.name != MEMORY]


def file_name(metric: Metric, ending: str = ".png") -> str:
    return f"pareto_{metric.short_name}{ending}"


def points_of(rows: list[Row], metric: Metric) -> list[Point]:
    """Return one point for each memory and quality, by memory; experiments with both equal share it.

    Experiments that differ in their seed alone are one point, at their mean. Names have what varies between those here.
    """
    shared: dict[tuple[float, float], list[Row]] = {}
    here = [row for row in rows if _quality_of(row, metric) is not None and MEMORY in row["metrics"]]
    several_models = len({_model_of(row) for row in rows if row["metrics"]}) > 1
    for row in sorted(prepare(here), key=lambda row: row["number"]):
        if several_models:  # this plot may have one alone
            row["model"] = _model_of(row)
        quality, memory = _quality_of(row, metric), row["metrics"].get(MEMORY)
        if memory is not None and quality is not None:
            shared.setdefault((memory, quality), []).append(row)
    return [_point(memory, quality, group, metric) for (memory, quality), group in sorted(shared.items())]


def _model_of(row: Row) -> str:
    return str(row["label"]).partition(SEPARATOR)[0]


def _quality_of(row: Row, metric: Metric) -> float | None:
    return math.inf if is_infinite(row["metrics"], metric) else row["metrics"].get(metric.name)


def _point(memory: float, quality: float, group: list[Row], metric: Metric) -> Point:
    names = [_name_of_point(row) for row in group]
    offloads = tuple(dict.fromkeys(row["offload"] for row in group))
    spread = max(row.get("spread", {}).get(metric.name, 0.0) for row in group)
    interval = next((found for row in group if (found := row.get("intervals", {}).get(metric.name))), None)
    family = backend_family(group[0]["backend"])
    return Point(memory, quality, tuple(dict.fromkeys(names)), offloads, family, spread, interval)


def _name_of_point(row: Row) -> str:
    seeds = f"({row['seeds']} seeds)" if "seeds" in row else ""
    return " ".join(filter(None, (row["model"], row["backend"], row["setting"], seeds)))


def pareto_front(points: list[Point], *, is_higher_better: bool = True) -> list[Point]:
    """Return the points no other point beats, by memory."""
    front: list[Point] = []
    sign = 1 if is_higher_better else -1
    for point in sorted(points, key=lambda point: (point.memory_gib, -sign * point.quality)):
        if not front or sign * point.quality > sign * front[-1].quality:
            front.append(point)
    return front


def points_csv(points: list[Point], metric: Metric) -> str:
    """Return the numbers behind a plot: a line for each point, numbered as it is there, by memory.

    low, high: ends of its bar, see `bar`; memory in the unit of its name; inf is what is identical to its reference.
    """
    front = pareto_front(points, is_higher_better=metric.better != "lower")
    lines = [
        {
            "number": number, "name": " / ".join(point.names), "offloads": ", ".join(point.offloads),
            "family": point.family, "memory_weights_gib": point.memory_gib, metric.short_name: point.quality,
            "low": low, "high": high, "bar": point.bar_kind, "on_front": int(point in front),
        }
        for number, point in enumerate(points, start=1)
        for low, high in [point.bar or (None, None)]
    ]  # fmt: skip
    return to_csv(list(lines[0]), lines)
