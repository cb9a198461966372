"""quality=: the smallest mix that reaches a bound, found by halving the front, one run at each try."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qexp.errors import ConfigError
from qexp.fit.contestants import Contestant, contestants_of, make_contestant
from qexp.fit.front import FrontPoint, mixed_front
from qexp.fit.opened import OpenedModel
from qexp.fit.plan import FitPlan
from qexp.fit.proof import Proven, run_proof
from qexp.fit.request import Request
from qexp.system.screen import say


def contestants_for_quality(
    opened: OpenedModel,
    plan: FitPlan,
    request: Request,
    folder: Path,
    variants: Sequence[Sequence[str]],
    sweep: str,
) -> list[Contestant]:
    """The smallest mix of the front that reaches the bound with the first variant, its neighbours, and all that are
    uniform, or a rule by hand.

    Raises: ConfigError if the largest mix within the other bounds does not reach it.
    """
    assert request.quality is not None
    front = [one for one in mixed_front(plan.groups, plan.size) if _fits(plan, one)]
    low, high = -1, len(front) - 1  # the mix at `high` reaches it, that at `low` does not
    if not _reaches(opened, plan, request, front[high], folder, variants, sweep):
        raise ConfigError(
            f"quality={request.quality}: the largest mix within the other bounds does not reach it; lower it, raise "
            "them, or name larger formats: formats=[…]"
        )
    while high - low > 1:
        middle = (low + high) // 2
        if _reaches(opened, plan, request, front[middle], folder, variants, sweep):
            high = middle
        else:
            low = middle
    others = [one for one in contestants_of(opened, plan, {"mix": front[high].mix}, folder) if one.kind != "mix"]
    near = [front[place] for place in (high - 1, high, high + 1) if 0 <= place < len(front)]
    return [*(_contestant(opened, plan, one, folder) for one in near), *others]


def _fits(plan: FitPlan, one: FrontPoint) -> bool:
    return plan.limits.device_bytes_of(one.mix) <= plan.limits.device_bytes


def _contestant(opened: OpenedModel, plan: FitPlan, one: FrontPoint, folder: Path) -> Contestant:
    return make_contestant(opened, plan, f"mix of {one.bits:.2f} bits", "mix", one.mix, folder)


def _reaches(
    opened: OpenedModel,
    plan: FitPlan,
    request: Request,
    one: FrontPoint,
    folder: Path,
    variants: Sequence[Sequence[str]],
    sweep: str,
) -> bool:
    """Return whether a mix reaches the bound with the first variant. Raises: ConfigError for a run that failed."""
    assert request.quality is not None
    found: Proven = run_proof(opened, [_contestant(opened, plan, one, folder)], variants[:1], f"{sweep}_search")[0]
    if found.problem or request.quality.metric.name not in found.samples:
        raise ConfigError(f"quality={request.quality} cannot be measured: {found.problem or 'no samples of it'}")
    value = found.mean(request.quality.metric)
    say(f"mix of {one.bits:.2f} bits: {request.quality.metric.short_name} {value:.4g}")
    return request.quality.is_reached(value)
