"""Times of steps: the median, least and greatest of all but the first one.

The first step also pays for what happens once (kernels that are compiled, memory that is touched for the first time),
so it is a metric of its own. Of a run with one step there is no median: null, and `measured_steps` is 0.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from math import inf

from qexp.metrics.registry import MODEL_TASKS, TASKS, Metric

WARM_UP_STEPS = 1  # the first step compiles kernels and fills caches


def step_times(times_ms: Sequence[float]) -> dict[str, float | None]:
    """Return the metrics of the times of all steps, in the order in which they ran."""
    measured = times_ms[WARM_UP_STEPS:]
    return {
        "time/step_ms": statistics.median(measured) if measured else None,
        "time/step_ms_min": min(measured, default=None),
        "time/step_ms_max": max(measured, default=None),
        "time/first_step_ms": times_ms[0],
        "time/measured_steps": len(measured),
    }


def _time(name: str, meaning: str, unit: str, header: str = "", order: int = 20, digits: str = ".1f") -> Metric:
    tasks = MODEL_TASKS if unit == "ms" else TASKS
    return Metric(
        f"time/{name}", meaning, header=header, unit=unit, better="lower", range=(0, inf), tasks=tasks, digits=digits,
        varies=True, order=order,
    )  # fmt: skip


METRICS = (
    _time("step_ms", "median time of a step but the first; null for a run with one step", "ms", "step ms", 10),
    _time("step_ms_min", "the fastest of these steps", "ms", order=11),
    _time("step_ms_max", "the slowest of these steps", "ms", order=12),
    _time("first_step_ms", "the first step, in which caches are cold", "ms", order=13),
    Metric("time/measured_steps", "their number", range=(0, inf), tasks=MODEL_TASKS, digits=".0f", order=14),
    _time("total_seconds", "time of the task: all steps and what is between them", "s", digits=".2f"),
    Metric(
        "time/other_cores", "cores that other programs kept busy while the task ran; above a tenth of those that it "
        "may use, reports mark its times", unit="cores", better="lower", range=(0, inf), tasks=MODEL_TASKS, varies=True,
        order=40,
    ),
    Metric(
        "time/load_average", "load average of the machine over the last minute, when the task ended", range=(0, inf),
        tasks=MODEL_TASKS, varies=True, order=41,
    ),
    Metric(
        "time/tokens_per_second", "tokens of all prompts, or of a text, in a second", unit="1/s", better="higher",
        range=(0, inf), tasks=("generate", "perplexity"), digits=".1f", varies=True, order=30,
    ),
)  # fmt: skip
