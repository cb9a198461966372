"""Drawings of memory against quality: one for a screen, and figures for papers in one column and in two.

Points are numbered, and named in the legend, in bold on the front. What is identical to its reference lies on a line of
its own at the top. Fonts are embedded in PDF (TrueType, as publishers ask), and drawn as outlines in SVG. Files of the
same points are the same bytes.
"""

from __future__ import annotations

import io
import math
import textwrap
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qexp.metrics.registry import Metric, all_metrics
from qexp.report.pareto import MEMORY, Point, pareto_front
from qexp.results.numbers import shown_unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

COLORS = ("#0072B2", "#D55E00", "#009E73", "#B3589A", "#B8860B", "#3A8FB7", "#444444")  # told apart by color-blind eyes
INK, FAINT, GRID = "#222222", "#8a8a8a", "#e6e6e6"
BELOW = 2  # columns of a legend below the plot
LOG_FROM = 3.0  # a memory axis that spans more than this factor is logarithmic
RC = {"pdf.fonttype": 42, "svg.fonttype": "path", "svg.hashsalt": "qexp"}
NO_DATES: dict[str, dict[str, Any]] = {
    "png": {"Software": None}, "pdf": {"CreationDate": None, "Producer": None, "Creator": None}, "svg": {"Date": None}
}  # fmt: skip


@dataclass(frozen=True)
class Style:
    """Size and place of what is drawn; inches, and points of type.

    wrap: characters of a name in a line of the legend; lines: entries of the legend in a column; near: numbers of
    points closer than this, in points of type, are written together.
    """

    width: float
    height: float
    font: float
    legend: str
    wrap: int
    lines: int
    near: float
    has_title: bool = False


SCREEN = Style(11, 5.8, 10, "outside right upper", 44, 36, 6.7, has_title=True)
PAPER = {  # widths of a column and of a page in most templates
    "1col": Style(3.3, 2.4, 7, "outside lower left", 24, 0, 5),
    "2col": Style(7.0, 3.2, 7.5, "outside right upper", 34, 30, 5),
}


def draw_pareto(points: list[Point], metric: Metric, title: str, style: Style, kind: str) -> bytes:
    """Return a drawing of the points (`points_of`, at least one) as a file. kind: png, pdf or svg."""
    import matplotlib

    unit, factor = shown_unit(all_metrics()[MEMORY], [point.memory_gib for point in points])
    points = [replace(point, memory_gib=point.memory_gib * factor) for point in points]  # from here on in this unit
    front = pareto_front(points, is_higher_better=metric.better != "lower")
    offloads = _common_offloads(points)
    labels = [f"{n}  {point.label(offloads)}" for n, point in enumerate(points, start=1)]
    names = [textwrap.fill(label, style.wrap).replace("$", r"\$") for label in labels]  # $ would begin a formula
    style = _with_room(style, names)
    data = io.BytesIO()
    settings: Any = {**RC, "font.size": style.font}
    with matplotlib.rc_context(settings):
        figure, axes = _figure(all_metrics()[MEMORY].axis.format(unit=unit), metric.axis, style)
        _draw_title(axes, title if style.has_title else "", _notes(points, offloads), style)
        if points[-1].memory_gib > LOG_FROM * points[0].memory_gib > 0:
            _logarithmic(axes)
        top = _exact_height(points)
        _draw_front(axes, front, top)
        entries = [_draw_point(axes, number, points, front, top, style) for number in range(1, len(points) + 1)]
        if any(math.isinf(point.quality) for point in points):
            _draw_exact_line(axes, top, metric.unit, style)
        _draw_legend(figure, axes, entries, names, [point in front for point in points], style)
        _draw_numbers(axes, [(point.memory_gib, _height(point, top)) for point in points], style)
        figure.savefig(data, format=kind, metadata=NO_DATES[kind])
    return data.getvalue()


def _with_room(style: Style, names: list[str]) -> Style:
    """Return the style with its height for the legend: below the plot it is added, beside it the plot grows to it."""
    if style.has_title:
        return style
    inches = 1.35 * 0.85 * style.font / 72 * (1 + sum(name.count("\n") + 1 for name in names))
    if style.lines:
        return replace(style, height=max(style.height, min(inches, 9.0) + 0.3))
    return replace(style, height=style.height + inches / BELOW, lines=-(-(len(names) + 1) // BELOW))


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


def _figure(memory: str, quality: str, style: Style) -> tuple[Figure, Axes]:
    """Make an empty plot.

    A bare `Figure`, without pyplot: nothing is registered anywhere, no display is asked for.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(style.width, style.height), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xlabel(memory, color=INK)
    axes.set_ylabel(quality if style.has_title else textwrap.fill(quality, 28), color=INK)  # a small axis is shorter
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.14, y=0.12)
    return figure, axes


def _draw_title(axes: Axes, title: str, note: str, style: Style) -> None:
    """Write the title, and below it what the bars and offloads are; in a paper the caption is the title."""
    axes.set_title(
        title.replace("$", r"\$"),
        loc="left",
        color=INK,
        fontsize=1.2 * style.font,
        fontweight="bold",
        pad=24 if note else 10,
    )
    wrapped = note if style.has_title else textwrap.fill(note, round(style.width * 72 / (0.5 * style.font)))
    axes.text(0, 1.025, wrapped, transform=axes.transAxes, color=FAINT, fontsize=0.9 * style.font, va="bottom")


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


def _draw_point(axes: Axes, number: int, points: list[Point], front: list[Point], top: float, style: Style) -> Line2D:
    """Full on the front, hollow and further back behind it; with its bar."""
    point = points[number - 1]
    color = _colors(points)[point.family]
    look: dict[str, Any] = {
        "color": color if point in front else "white",
        "markeredgecolor": color,
        "markeredgewidth": 0.18 * style.font,
        "zorder": 3 if point in front else 2,
    }
    x, y = [point.memory_gib], [_height(point, top)]
    if point.bar is not None and math.isfinite(point.quality):
        ends = [[max(point.quality - point.bar[0], 0.0)], [max(point.bar[1] - point.quality, 0.0)]]
        axes.errorbar(x, y, yerr=ends, color=color, capsize=0.3 * style.font, linewidth=0.1 * style.font, zorder=1)
    (drawn,) = axes.plot(x, y, "o", markersize=0.8 * style.font, **look)
    return drawn


def _draw_legend(
    figure: Figure, axes: Axes, entries: list[Line2D], labels: list[str], on_front: list[bool], style: Style
) -> None:
    """Name the numbered points, from left to right, beside or below the plot; those on the front in bold."""
    look: dict[str, Any] = {"loc": style.legend}
    if not style.has_title:
        look |= {"handlelength": 1.2, "columnspacing": 0.8, "labelspacing": 0.25}
    legend = figure.legend(
        [*axes.lines[:1], *entries], ["Pareto front", *labels], ncols=-(-len(labels) // style.lines),
        frameon=False, fontsize=0.8 * style.font, labelcolor=INK, borderaxespad=0.2, **look,
    )  # fmt: skip
    for text, is_bold in zip(legend.get_texts()[1:], on_front, strict=True):
        text.set_fontweight("bold" if is_bold else "normal")


def _draw_numbers(axes: Axes, places: list[tuple[float, float]], style: Style) -> None:
    """Write each point's number beside it, of points that lie on one another all of them beside the first."""
    from matplotlib.patheffects import withStroke

    axes.figure.canvas.draw()  # places in pixels are known from here on
    near = style.near * axes.figure.dpi / 72
    groups: list[tuple[Any, list[int]]] = []
    for number, pixel in enumerate(axes.transData.transform(places), start=1):
        close = next((numbers for first, numbers in groups if math.dist(first, pixel) < near), None)
        if close is None:
            groups.append((pixel, [number]))
        else:
            close.append(number)
    for _, numbers in groups:
        text = axes.annotate(
            " ".join(map(str, numbers)), places[numbers[-1] - 1], xytext=(6, -4), textcoords="offset points",
            va="top", color=INK, fontsize=0.8 * style.font,
        )  # fmt: skip
        text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])  # lines behind it do not strike it out


def _draw_exact_line(axes: Axes, top: float, unit: str, style: Style) -> None:
    axes.axhline(top, color=FAINT, linewidth=0.8, linestyle=":", zorder=0)
    place = axes.get_yaxis_transform()  # x as a share of the width
    axes.text(0.008, top, f"identical (∞ {unit})", transform=place, va="bottom", color=FAINT, fontsize=0.9 * style.font)
