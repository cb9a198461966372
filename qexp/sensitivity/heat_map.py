"""The picture of a table: groups of layers down, formats across by their bytes, colors by what they cost.

Costs span orders of magnitude, so colors are logarithmic; a format that a group cannot have is left white.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

from qexp.sensitivity.table import DENSE, Candidate, SensitivityTable
from qexp.system.files import write_bytes

PNG = "sensitivity.png"
ROWS = 400  # groups in a picture; of more, every second, third … one is shown
LONGEST = 60  # characters of a name
LABELS = 80  # names of groups beside it


def draw_heat_map(table: SensitivityTable, folder: Path) -> None:
    """Write sensitivity.png. Raises DiskError."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    groups = [*table.groups().values()]
    groups = groups[:: math.ceil(len(groups) / ROWS)]
    formats = _by_bits(table)
    values = [[_score(candidates, name) for name in formats] for candidates in groups]
    shown = [value for row in values for value in row if value > 0]  # NaN is not
    labels = [_label(table, candidates[0]) for candidates in groups]
    width = 1.8 + 0.06 * max(map(len, labels)) + 0.45 * max(len(formats), 4)  # inches: labels, map, bar
    height = 0.8 + 0.08 * max(map(len, formats), default=0) + 0.16 * min(max(len(groups), 8), 140)
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    norm = LogNorm(min(shown), max(shown)) if shown and min(shown) < max(shown) else None
    image = axes.imshow(values, aspect="auto", cmap="viridis", norm=norm, interpolation="nearest")
    figure.colorbar(image, label=table.header.unit.partition(",")[0])
    step = math.ceil(len(groups) / LABELS)
    axes.set_yticks(range(0, len(groups), step), labels[::step], fontsize=6)
    axes.set_xticks(range(len(formats)), formats, rotation=60, ha="right", fontsize=7)
    axes.set_title(f"{table.header.model}: cost by layer and format ({table.header.score})", fontsize=8)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=150)
    write_bytes(folder / PNG, data.getvalue())


def _by_bits(table: SensitivityTable) -> list[str]:
    """Return the formats from the fewest to the most bytes, in the groups that have them."""
    shares: dict[str, list[float]] = {}
    for candidates in table.groups().values():
        largest = max(candidate.nbytes for candidate in candidates) or 1
        for candidate in candidates:
            if candidate.format != DENSE:
                shares.setdefault(candidate.format, []).append(candidate.nbytes / largest)
    return sorted(shares, key=lambda name: (sum(shares[name]) / len(shares[name]), name))


def _score(candidates: Sequence[Candidate], name: str) -> float:
    return next((candidate.score for candidate in candidates if candidate.format == name), math.nan)


def _label(table: SensitivityTable, candidate: Candidate) -> str:
    several = len(table.header.fixed_bytes) > 1
    name = candidate.group if len(candidate.layers) == 1 else f"{candidate.group} + {len(candidate.layers) - 1}"
    name = f"{candidate.component}: {name}" if several else name
    return name if len(name) <= LONGEST else f"…{name[-LONGEST:]}"
