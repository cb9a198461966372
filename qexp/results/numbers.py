"""How numbers of a result are shown: memory in one unit for a column, and no number other than 0 as 0."""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import median_low
from typing import TYPE_CHECKING, Any

from qexp.metrics.registry import Metric

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_GAIN_EXPONENT = 20  # below a millionth of the range, a difference is noise of the numbers
PER_GIB = {"GiB": 1, "MiB": 2**10, "KiB": 2**20}  # largest first


def shown_unit(metric: Metric, values: Iterable[float | None]) -> tuple[str, float]:
    """Return the unit in which a metric's values are shown together, and the factor from the stored one.

    Memory is stored in GiB and shown in the largest unit in which the middle one of the values is 1 or more.
    """
    if metric.unit != "GiB":
        return metric.unit, 1
    present = [abs(value) for value in values if value]
    middle = median_low(present) if present else 1.0
    unit = next((unit for unit, factor in PER_GIB.items() if middle * factor >= 1), "KiB")
    return unit, PER_GIB[unit]


def format_number(value: float, digits: str) -> str:
    """Format a value, with two significant digits where `digits` would leave nothing of it."""
    text = format(value, digits)
    return format(value, ".2g") if value and not float(text.rstrip("%")) else text


def format_memory(gib: float) -> str:
    """'2.7 MiB': one value in a unit of its size."""
    unit = next((unit for unit, factor in PER_GIB.items() if abs(gib) * factor >= 1), "KiB")
    return f"{format_number(gib * PER_GIB[unit], '.1f')} {unit}"


def format_duration(seconds: float) -> str:
    """'12 s', '4 min', '1 h 20 min': a time that is left, which is not known to the second."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def difference_gain(difference: NDArray[np.floating[Any]]) -> float:
    """Return the power of two, 1 or more, that shows a difference best: all but its highest thousandth stays in [0, 1].

    A fixed scale shows nothing of a good format, whose pixels differ by a hundredth. Values that are not finite do not
    count.
    """
    import numpy as np

    finite = difference[np.isfinite(difference)]
    if not finite.any():
        return 1.0
    place = max(0, round(0.999 * finite.size) - 1)
    nearly_highest = float(np.partition(finite, place)[place]) or float(finite.max())
    return 2.0 ** min(max(math.floor(-math.log2(nearly_highest)), 0), MAX_GAIN_EXPONENT)
