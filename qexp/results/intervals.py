"""The 95 % intervals of a run's metrics, from its samples.csv.

A sample (a prompt) of several seeds has the mean of its values over the seeds: it is one sample, however often it is
drawn. The interval of a metric that is the exponential of a mean (perplexity) is that of the mean, through exp.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from qexp.metrics.registry import Metric, metrics_in
from qexp.results.samples import Values
from qexp.results.uncertainty import Interval, mean_interval


def metric_intervals(samples: Mapping[str, Values], metrics: Mapping[str, float | None]) -> dict[str, Interval]:
    """Return metric -> interval, for the metrics that have a value and samples that say something about it."""
    found = {}
    for metric in sampled_metrics(metrics):
        means = [value for value in mean_over_seeds(samples.get(metric.name, {})).values() if math.isfinite(value[0])]
        interval = mean_interval([value for value, _ in means], [weight for _, weight in means])
        if interval is not None and metrics.get(metric.name) is not None:
            low, high = interval
            found[metric.name] = (math.exp(low), math.exp(high)) if metric.of_mean == "exp" else interval
    return found


def sampled_metrics(names: Iterable[str]) -> list[Metric]:
    """Return the metrics that are means over samples and better in one direction; of families those in `names`."""
    return [metric for metric in metrics_in(names) if metric.sample_kind and metric.better]


def mean_over_seeds(values: Values) -> dict[str, tuple[float, float]]:
    """Return sample -> (mean of its finite values, sum of their weights); infinite if all are."""
    parts: dict[str, list[tuple[float, float]]] = {}
    for (_, sample), value in values.items():
        parts.setdefault(sample, []).append(value)
    return {sample: _weighted_mean(found) for sample, found in parts.items()}


def _weighted_mean(values: Sequence[tuple[float, float]]) -> tuple[float, float]:
    finite = [(value, weight) for value, weight in values if math.isfinite(value)]
    if not finite:
        return values[0]
    total = math.fsum(weight for _, weight in finite)
    return math.fsum(value * weight for value, weight in finite) / total, total
