"""The plot of a sweep: memory of the weights against quality, with the Pareto front.

A point is on the front if no other one has less memory and at least its quality, or the same memory and more quality.
Experiments that share a point (the strategies of offloading move weights and change no answer) are one point, and so
are those that differ in their seed alone. Points are numbered, and named in the legend. What is identical to its
reference has an infinite ratio: its point lies on a line of its own at the top.
"""

from __future__ import annotations

import io
import math
import textwrap
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qexp.metrics.registry import Metric, all_metrics, is_infinite
from qexp.report.table import prepare
from qexp.results.labels import backend_family
from qexp.results.numbers import shown_unit
from qexp.results.rows import Row
from qexp.results.uncertainty import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

MEMORY = "memory/weights_gib"
COLORS = ("#0072B2", "#D55E00", "#009E73", "#B3589A", "#B8860B", "#3A8FB7", "#444444")  # told apart by color-blind eyes
INK, FAINT, GRID = "#222222", "#8a8a8a", "#e6e6e6"
NEAR = 14.0  # pixels: the numbers of points closer than this are written together
WRAP = 44  # characters of a name in a line of the legend
LINES = 36  # entries of the legend in a column
LOG_FROM = 3.0  # a memory axis that spans more than this factor is logarithmic


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

    def label(self, common_offloads: tuple[str, ...]) -> str:
        """Return the names; and the offload strategies, unless they are the same at every point."""
        name = " / ".join(self.names)
        return name if self.offloads == common_offloads else f"{name} ({', '.join(self.offloads)})"


def plotted_metrics() -> list[Metric]:
    """Return the metrics that are plotted against memory, each in a plot of its own."""
    return [metric for metric in all_metrics().values() if metric.axis and metric.name != MEMORY]


def file_name(metric: Metric) -> str:
    return f"pareto_{metric.short_name}.png"


def points_of(rows: list[Row], metric: Metric) -> list[Point]:
    """Return one point for each memory and quality, by memory; experiments with both equal share it.

    Experiments that differ in their seed alone are one point, at their mean.
    """
    shared: dict[tuple[float, float], list[Row]] = {}
    for row in sorted(prepare(rows), key=lambda row: row["number"]):
        quality, memory = _quality_of(row, metric), row["metrics"].get(MEMORY)
        if memory is not None and quality is not None:
            shared.setdefault((memory, quality), []).append(row)
    return [_point(memory, quality, group, metric) for (memory, quality), group in sorted(shared.items())]


def _quality_of(row: Row, metric: Metric) -> float | None:
    value: float | None = row["metrics"].get(metric.name)
    return math.inf if is_infinite(row["metrics"], metric) else value


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


def pareto_png(rows: list[Row], metric: Metric, title: str) -> bytes | None:
    """Return the plot as PNG, None if no experiment has this metric."""
    points = points_of(rows, metric)
    if not points:
        return None
    unit, factor = shown_unit(all_metrics()[MEMORY], [point.memory_gib for point in points])
    points = [replace(point, memory_gib=point.memory_gib * factor) for point in points]  # from here on in this unit
    front = pareto_front(points, is_higher_better=metric.better != "lower")
    offloads = _common_offloads(points)
    figure, axes = _figure(all_metrics()[MEMORY].axis.format(unit=unit), metric.axis, title, _notes(points, offloads))
    if points[-1].memory_gib > LOG_FROM * points[0].memory_gib > 0:
        _logarithmic(axes)
    top = _exact_height(points)
    _draw_front(axes, front, top)
    entries = [_draw_point(axes, number, points, front, top) for number in range(1, len(points) + 1)]
    if any(math.isinf(point.quality) for point in points):
        _draw_exact_line(axes, top, metric.unit)
    _draw_legend(figure, axes, entries, [point.label(offloads) for point in points], [p in front for p in points])
    _draw_numbers(axes, [(point.memory_gib, _height(point, top)) for point in points])
    data = io.BytesIO()
    figure.savefig(data, format="png", metadata={"Software": None})
    return data.getvalue()


def _common_offloads(points: list[Point]) -> tuple[str, ...]:
    """Return the offload strategies of every point, if they are the same everywhere."""
    return points[0].offloads if len({point.offloads for point in points}) == 1 else ()


def _exact_height(points: list[Point]) -> float:
    """Return the height at which infinity is drawn: a fifth of the range above the best finite quality."""
    finite = [point.quality for point in points if math.isfinite(point.quality)]
    return max(finite) + max(0.2 * (max(finite) - min(finite)), 2.0) if finite else 1.0


def _height(point: Point, top: float) -> float:
    return point.quality if math.isfinite(point.quality) else top


def _notes(points: list[Point], offloads: tuple[str, ...]) -> str:
    """Return the line below the title: the offload of all points, and the meaning of their bars."""
    shared = f"offload: {', '.join(offloads)}{' share every point' if len(offloads) > 1 else ''}" if offloads else ""
    intervals = "95 % interval" if any(point.interval for point in points) else ""
    spreads = "standard deviation over seeds" if any(point.spread and not point.interval for point in points) else ""
    bars = ", or else ".join(filter(None, (intervals, spreads)))
    return "; ".join(filter(None, (shared, bars and f"bars: {bars}")))


def _figure(memory: str, quality: str, title: str, note: str) -> tuple[Figure, Axes]:
    """Make an empty plot.

    A bare `Figure`, without pyplot: nothing is registered anywhere, no display is asked for.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.8), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", color=INK, fontsize=12, fontweight="bold", pad=24 if note else 10)
    axes.text(0, 1.025, note, transform=axes.transAxes, color=FAINT, fontsize=9)
    axes.set_xlabel(memory, color=INK)
    axes.set_ylabel(quality, color=INK)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.14, y=0.12)
    return figure, axes


def _logarithmic(axes: Axes) -> None:
    """Write the ticks, powers of two, as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(LogLocator(base=2, subs=(1.0, 1.5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def _draw_front(axes: Axes, front: list[Point], top: float) -> None:
    """Draw stairs: up to the next point, the quality of this one is the best that fits."""
    x, y = [front[0].memory_gib], [_height(front[0], top)]
    for point in front[1:]:
        x += [point.memory_gib, point.memory_gib]
        y += [y[-1], _height(point, top)]
    axes.plot(x, y, color=FAINT, linewidth=1.4, linestyle="--", label="Pareto front", zorder=1)


def _colors(points: list[Point]) -> dict[str, str]:
    families = sorted({point.family for point in points})
    return {family: COLORS[number % len(COLORS)] for number, family in enumerate(families)}


def _draw_point(axes: Axes, number: int, points: list[Point], front: list[Point], top: float) -> Line2D:
    """Full on the front, hollow and further back behind it; with its bar."""
    point = points[number - 1]
    color = _colors(points)[point.family]
    style: dict[str, Any] = {
        "color": color if point in front else "white",
        "markeredgecolor": color,
        "markeredgewidth": 1.8,
        "zorder": 3 if point in front else 2,
    }
    x, y = [point.memory_gib], [_height(point, top)]
    if point.bar is not None and math.isfinite(point.quality):
        ends = [[max(point.quality - point.bar[0], 0.0)], [max(point.bar[1] - point.quality, 0.0)]]
        axes.errorbar(x, y, yerr=ends, color=color, capsize=3, linewidth=1, zorder=1)
    (drawn,) = axes.plot(x, y, "o", markersize=8, **style)
    return drawn


def _draw_legend(figure: Figure, axes: Axes, entries: list[Line2D], names: list[str], on_front: list[bool]) -> None:
    """Name the numbered points, from left to right, beside the plot; those on the front in bold."""
    labels = [textwrap.fill(f"{number}  {name}", WRAP) for number, name in enumerate(names, start=1)]
    columns = -(-len(labels) // LINES)
    legend = figure.legend(
        [*axes.lines[:1], *entries], ["Pareto front", *labels], loc="outside right upper", ncols=columns, frameon=False,
        fontsize=8, labelcolor=INK, borderaxespad=0.2,
    )  # fmt: skip
    for text, is_bold in zip(legend.get_texts()[1:], on_front, strict=True):
        text.set_fontweight("bold" if is_bold else "normal")


def _draw_numbers(axes: Axes, places: list[tuple[float, float]]) -> None:
    """Write each point's number beside it, of points that lie on one another all of them beside the first."""
    from matplotlib.patheffects import withStroke

    axes.figure.canvas.draw()  # places in pixels are known from here on
    groups: list[tuple[Any, list[int]]] = []
    for number, pixel in enumerate(axes.transData.transform(places), start=1):
        near = next((numbers for first, numbers in groups if math.dist(first, pixel) < NEAR), None)
        if near is None:
            groups.append((pixel, [number]))
        else:
            near.append(number)
    for _, numbers in groups:
        text = axes.annotate(
            " ".join(map(str, numbers)), places[numbers[-1] - 1], xytext=(6, -4), textcoords="offset points",
            va="top", color=INK, fontsize=8,
        )  # fmt: skip
        text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])  # lines behind it do not strike it out


def _draw_exact_line(axes: Axes, top: float, unit: str) -> None:
    axes.axhline(top, color=FAINT, linewidth=0.8, linestyle=":", zorder=0)
    place = axes.get_yaxis_transform()  # x as a share of the width
    axes.text(0.008, top, f"identical (∞ {unit})", transform=place, va="bottom", color=FAINT, fontsize=9)
