"""The plot of a sweep: memory of the weights against quality, with the Pareto front.

A point is on the front if no other one has less memory and at least its quality, or the same memory and more quality.
Experiments that share a point (the strategies of offloading move weights and change no answer) are one point with one
label. What is identical to its reference has an infinite ratio: its point lies on a line of its own at the top.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qexp.report.annotate import Box, Label, boxes_of_line, place_labels
from qexp.report.table import MIB, is_exact, prepare
from qexp.results.rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# metric -> (axis label, file name); a sweep over both tasks gives both plots
QUALITIES = {
    "quality/psnr_db": ("PSNR against the unquantized model (dB)", "pareto_psnr.png"),
    "quality/top1_agreement": ("same most probable token as the unquantized model", "pareto_top1.png"),
    "roundtrip/sqnr_db_mean": ("mean SQNR of the weights (dB)", "pareto_sqnr.png"),
}
COLORS = ("#0072B2", "#D55E00", "#009E73", "#B3589A", "#B8860B", "#3A8FB7", "#444444")  # told apart by color-blind eyes
INK, FAINT, GRID = "#222222", "#8a8a8a", "#e6e6e6"
LOG_FROM = 3.0  # a memory axis that spans more than this factor is logarithmic


@dataclass(frozen=True)
class Point:
    """quality is infinite for what is identical; names and offloads are of the experiments that share the point."""

    memory_mib: float
    quality: float
    names: tuple[str, ...]
    offloads: tuple[str, ...]
    family: str  # of its color: the library that quantized

    def label(self, common_offloads: tuple[str, ...]) -> str:
        """Its names; and its offload strategies, unless they are the same at every point."""
        name = " / ".join(self.names)
        return name if self.offloads == common_offloads else f"{name} ({', '.join(self.offloads)})"


def points_of(rows: list[Row], metric: str) -> list[Point]:
    """One point per distinct memory and quality, by memory; equal up to what the table shows (0.01 MiB, 0.01 dB)."""
    shared: dict[tuple[float, float], list[Row]] = {}
    for row in sorted(prepare(rows), key=lambda row: row["number"]):
        quality, memory = _quality(row, metric), row["metrics"].get("memory/weights_gib")
        if memory is not None and quality is not None:
            shared.setdefault((round(memory * MIB, 2), round(quality, 2)), []).append(row)
    return [_point(memory, quality, group) for (memory, quality), group in sorted(shared.items())]


def _quality(row: Row, metric: str) -> float | None:
    value: float | None = row["metrics"].get(metric)
    return math.inf if is_exact(row["metrics"], metric) else value


def _point(memory: float, quality: float, group: list[Row]) -> Point:
    names = [" ".join(filter(None, (row["model"], row["backend"], row["setting"]))) for row in group]
    offloads = tuple(dict.fromkeys(row["offload"] for row in group))
    family = str(group[0]["backend"]).partition(" ")[0]
    return Point(memory, quality, tuple(dict.fromkeys(names)), offloads, family)


def pareto_front(points: list[Point]) -> list[Point]:
    """The points no other point beats, by memory."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.memory_mib, -point.quality)):
        if not front or point.quality > front[-1].quality:
            front.append(point)
    return front


def pareto_png(rows: list[Row], metric: str, title: str) -> bytes | None:
    """The plot as PNG, None if no experiment has this metric."""
    points = points_of(rows, metric)
    if not points:
        return None
    offloads = _common_offloads(points)
    figure, axes = _figure(QUALITIES[metric][0], title, offloads)
    if points[-1].memory_mib > LOG_FROM * points[0].memory_mib > 0:
        _logarithmic(axes)
    top = _exact_height(points)
    corners = _draw_front(axes, pareto_front(points), top)
    _draw_points(axes, points, top)
    texts: list[Any] = [axes.legend(frameon=False, loc="lower right", fontsize=9, labelcolor=INK)]
    if any(math.isinf(point.quality) for point in points):
        texts.append(_draw_exact_line(axes, top))
    figure.canvas.draw()  # sizes and places are known from here on
    obstacles = [*boxes_of_line(axes, *corners), *(Box(*text.get_window_extent().extents) for text in texts)]
    place_labels(axes, _labels(points, offloads, top), obstacles)
    data = io.BytesIO()
    figure.savefig(data, format="png", metadata={"Software": None})
    return data.getvalue()


def _common_offloads(points: list[Point]) -> tuple[str, ...]:
    """The offload strategies of every point, if they are the same everywhere."""
    return points[0].offloads if len({point.offloads for point in points}) == 1 else ()


def _exact_height(points: list[Point]) -> float:
    """Where infinity is drawn: a fifth of the range above the best finite quality."""
    finite = [point.quality for point in points if math.isfinite(point.quality)]
    return max(finite) + max(0.2 * (max(finite) - min(finite)), 2.0) if finite else 1.0


def _height(point: Point, top: float) -> float:
    return point.quality if math.isfinite(point.quality) else top


def _figure(quality: str, title: str, offloads: tuple[str, ...]) -> tuple[Figure, Axes]:
    """An empty plot. A bare `Figure`, without pyplot: nothing is registered anywhere, no display is asked for."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.8), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", color=INK, fontsize=12, fontweight="bold", pad=24 if offloads else 10)
    note = f"offload: {', '.join(offloads)}{' share every point' if len(offloads) > 1 else ''}" if offloads else ""
    axes.text(0, 1.025, note, transform=axes.transAxes, color=FAINT, fontsize=9)
    axes.set_xlabel("memory of the weights (MiB)", color=INK)
    axes.set_ylabel(quality, color=INK)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.14, y=0.12)
    return figure, axes


def _logarithmic(axes: Axes) -> None:
    """Powers of two, written as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(LogLocator(base=2, subs=(1.0, 1.5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def _draw_front(axes: Axes, front: list[Point], top: float) -> tuple[list[float], list[float]]:
    """Stairs: up to the next point, its quality is the best that fits. Returns the corners."""
    x, y = [front[0].memory_mib], [_height(front[0], top)]
    for point in front[1:]:
        x += [point.memory_mib, point.memory_mib]
        y += [y[-1], _height(point, top)]
    axes.plot(x, y, color=FAINT, linewidth=1.4, linestyle="--", label="Pareto front", zorder=1)
    return x, y


def _colors(points: list[Point]) -> dict[str, str]:
    families = sorted({point.family for point in points})
    return {family: COLORS[number % len(COLORS)] for number, family in enumerate(families)}


def _draw_points(axes: Axes, points: list[Point], top: float) -> None:
    """Full on the front, hollow and further back behind it."""
    front, colors = set(pareto_front(points)), _colors(points)
    for family, color in colors.items():
        axes.plot([], [], "o", color=color, markersize=8, label=family)
        for point in (point for point in points if point.family == family):
            style: dict[str, Any] = {
                "color": color if point in front else "white",
                "markeredgecolor": color,
                "markeredgewidth": 1.8,
                "zorder": 3 if point in front else 2,
            }
            axes.plot([point.memory_mib], [_height(point, top)], "o", markersize=8, **style)


def _draw_exact_line(axes: Axes, top: float) -> Any:
    axes.axhline(top, color=FAINT, linewidth=0.8, linestyle=":", zorder=0)
    place = axes.get_yaxis_transform()  # x as a share of the width, y in dB
    return axes.text(0.008, top, "identical (∞ dB)", transform=place, va="bottom", color=FAINT, fontsize=9)


def _labels(points: list[Point], offloads: tuple[str, ...], top: float) -> list[Label]:
    front, colors = set(pareto_front(points)), _colors(points)
    return [
        Label(
            text=point.label(offloads),
            at=(point.memory_mib, _height(point, top)),
            style={"color": colors[point.family], "fontsize": 9, "fontweight": "bold" if point in front else "normal"},
        )
        for point in points
    ]
