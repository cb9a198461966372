"""Who wins: the best of all that keep the bounds, and what is not decided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qexp.errors import ConfigError
from qexp.fit.budget import Size
from qexp.fit.proof import Proven
from qexp.fit.request import Request
from qexp.metrics.registry import Metric
from qexp.results.numbers import format_memory
from qexp.results.uncertainty import PairedComparison, compare_paired
from qexp.system.memory import GIB


@dataclass(frozen=True)
class Verdict:
    """best: is recommended; against: every other one that keeps the bounds -> how the best compares with it;
    over: name -> why it is out."""

    metric: Metric
    best: Proven
    against: tuple[tuple[Proven, PairedComparison], ...]
    over: dict[str, str]

    @property
    def undecided(self) -> list[str]:
        return [other.contestant.name for other, found in self.against if found.verdict == "undecided"]


def decide(proven: Sequence[Proven], metric: Metric, request: Request, size: Size) -> Verdict:
    """Choose the best mean of the metric, or for quality= the smallest that reaches it.

    Of equal ones the smaller is better. Raises: ConfigError where nothing keeps the bounds.
    """
    over = {one.contestant.name: why for one in proven if (why := why_out(one, metric, request, size))}
    kept = [one for one in proven if one.contestant.name not in over]
    if not kept:
        raise ConfigError(
            f"{request.bounds}: nothing that was run keeps it: "
            f"{'; '.join(f'{name}: {why}' for name, why in over.items())}"
        )
    sign = 1 if metric.better == "lower" else -1
    by_quality = sorted(kept, key=lambda one: (sign * one.mean(metric), one.weights_bytes))
    best = min(kept, key=lambda one: one.weights_bytes) if request.quality is not None else by_quality[0]
    others = [one for one in by_quality if one is not best]
    against = tuple((other, _compare(best, other, metric)) for other in others)
    return Verdict(metric, best, against, over)


def why_out(one: Proven, metric: Metric, request: Request, size: Size) -> str:
    """Why a result cannot be recommended: it failed, or what was measured is over a bound; '' if it can."""
    if one.problem:
        return one.problem
    if metric.name not in one.samples:
        return f"it has no samples of {metric.short_name}"
    if request.memory is not None and one.peak_bytes == 0:
        return "its peak was not measured; use isolation=process"
    groups = one.weights_bytes - size.fixed
    found = [
        (request.weights, one.weights_bytes, "its loaded weights take"),
        (request.memory, one.peak_bytes, "its measured peak is"),
    ]
    for bound, measured, what in found:
        if bound is not None and measured > bound:
            return f"{what} {format_memory(measured / GIB)}"
    if request.bits is not None and groups > size.bytes_at(request.bits):
        return f"its layers take {size.bits(groups):.4f} bits a weight as loaded"
    if request.step_ms is not None and one.step_ms > request.step_ms:
        return f"a step takes {one.step_ms:.0f} ms"
    if request.quality is not None and not request.quality.is_reached(one.mean(metric)):
        return f"{metric.short_name} is {one.mean(metric):.4g}"
    return ""


def _compare(best: Proven, other: Proven, metric: Metric) -> PairedComparison:
    return compare_paired(best.values(metric), other.values(metric), metric.better, best.weights(metric))
