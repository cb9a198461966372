"""Labels of points in a plot, placed so that they cover neither points, lines nor one another.

Greedy: each label in turn goes where its cost is lowest, of 8 directions at 4 distances from its point. The cost is
the area it would cover, counted more outside the plot, and a little for the distance; a far label gets a thin line to
its point. Boxes are pixels.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKER, GAP = 10.0, 5.0  # half of a marker's side; air between it and its label
DISTANCES = (0.0, 14.0, 32.0, 56.0, 84.0)
DIRECTIONS = tuple((math.cos(step * math.pi / 4), math.sin(step * math.pi / 4)) for step in (1, 0, 7, 3, 4, 5, 2, 6))
OUTSIDE, FAR = 8.0, 6.0  # weights of the cost


class Box(NamedTuple):
    x0: float
    y0: float
    x1: float
    y1: float

    def overlap(self, other: Box) -> float:
        width = min(self.x1, other.x1) - max(self.x0, other.x0)
        height = min(self.y1, other.y1) - max(self.y0, other.y0)
        return max(width, 0.0) * max(height, 0.0)

    def area(self) -> float:
        return (self.x1 - self.x0) * (self.y1 - self.y0)


class Label(NamedTuple):
    """What stands at which point (in data coordinates), and how it looks."""

    text: str
    at: tuple[float, float]
    style: dict[str, Any]


def place_labels(axes: Axes, labels: list[Label], obstacles: list[Box]) -> list[Box]:
    """Annotate `axes` (drawn before, so that sizes are known); returns where each label went."""
    from matplotlib.patheffects import withStroke

    frame = Box(*axes.bbox.extents)
    centers = [tuple(axes.transData.transform(label.at)) for label in labels]
    taken = [*obstacles, *(Box(x - MARKER, y - MARKER, x + MARKER, y + MARKER) for x, y in centers)]
    placed = []
    for label, center in zip(labels, centers, strict=True):
        text = axes.annotate(label.text, label.at, xytext=(0, 0), textcoords="offset pixels", **label.style)
        text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])  # lines behind it do not strike it out
        extent = text.get_window_extent()
        candidates = [
            (_beside(center, extent.width, extent.height, direction, distance), distance)
            for distance in DISTANCES
            for direction in DIRECTIONS
        ]
        box, distance = min(candidates, key=lambda candidate: _cost(candidate[0], candidate[1], frame, taken))
        text.set_position((box.x0 - center[0], box.y0 - center[1]))
        text.set(ha="left", va="bottom")
        if distance > 0:
            _draw_leader(axes, center, box, label.style["color"])
        taken.append(box)
        placed.append(box)
    return placed


def _beside(
    center: tuple[float, float], width: float, height: float, direction: tuple[float, float], distance: float
) -> Box:
    """A box that touches the circle around the marker from that direction."""
    dx, dy = direction
    x = center[0] + dx * (MARKER + GAP + distance + width / 2) if abs(dx) > 0.1 else center[0]
    y = center[1] + dy * (MARKER + distance + height / 2)
    return Box(x - width / 2, y - height / 2, x + width / 2, y + height / 2)


def _cost(box: Box, distance: float, frame: Box, taken: list[Box]) -> float:
    outside = box.area() - box.overlap(frame)
    return sum(box.overlap(other) for other in taken) + OUTSIDE * outside + FAR * distance


def _draw_leader(axes: Axes, center: tuple[float, float], box: Box, color: str) -> None:
    """From the marker to the nearest point of the label."""
    end = (min(max(center[0], box.x0), box.x1), min(max(center[1], box.y0), box.y1))
    line = axes.transData.inverted().transform([center, end])
    axes.plot(line[:, 0], line[:, 1], color=color, linewidth=0.7, alpha=0.6, zorder=1)


def boxes_of_line(axes: Axes, x: list[float], y: list[float], thickness: float = 6.0) -> list[Box]:
    """Obstacles along a line of horizontal and vertical pieces, given by its corners in data coordinates."""
    corners = axes.transData.transform(list(zip(x, y, strict=True)))
    half = thickness / 2
    return [
        Box(min(a[0], b[0]) - half, min(a[1], b[1]) - half, max(a[0], b[0]) + half, max(a[1], b[1]) + half)
        for a, b in pairwise(corners)
    ]
