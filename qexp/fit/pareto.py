"""The experiments of `experiment=mixed_pareto`: every uniform format of a model, and mixes over the whole range.

Scores are made first, or stored ones are taken; the recipes of the front are written to
outputs/fit/<model>_front_<tag>. All experiments run on samples that no score was made with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from qexp.errors import ConfigError
from qexp.fit.command import scores_of
from qexp.fit.contestants import make_contestant
from qexp.fit.front import FrontPoint, mixed_front, uniform_points
from qexp.fit.held_out import proof_variants
from qexp.fit.mix import Mix
from qexp.fit.opened import open_model
from qexp.fit.plan import plan_fit
from qexp.fit.request import Request
from qexp.models.base import TextSource


def front_jobs(job: Sequence[str], budgets: int, *, is_dry: bool) -> list[list[str]]:
    """Return the overrides of each experiment of one model: uniform formats, then mixes, by bytes.

    job: overrides of the experiment, but for the backend; is_dry: no scores are made. Raises: QexpError.
    """
    given = [
        word for word in job if word.lstrip("+~").partition("=")[0].partition("@")[0].partition(".")[0] == "backend"
    ]
    if given:
        raise ConfigError(f"{given[0]}: experiment=mixed_pareto goes through the backends itself; leave it out")
    with open_model(Request(tuple(job))) as found:
        is_text = isinstance(found.source, TextSource)
    words = [*job, "task=perplexity"] if is_text and not any(word.startswith("task=") for word in job) else list(job)
    request = Request(tuple(words))
    with open_model(request) as opened:
        tag = hashlib.sha256(repr(words).encode()).hexdigest()[:8]  # fronts of a sweep are planned before any is run
        folder = Path(opened.config.paths.outputs, "fit", f"{opened.name}_front_{tag}").resolve()
        place = scores_of(opened, request, is_plan=is_dry)
        plan = plan_fit(opened, request, place, None)
        (variant,) = proof_variants(opened, plan.table, place, folder, 1)
        named: list[tuple[str, Mix]] = [(one.name, one.mix) for one in uniform_points(plan.groups, plan.size)]
        seen = {_formats_of(mix) for _, mix in named}
        mixes = [one for one in mixed_front(plan.groups, plan.size, budgets) if _formats_of(one.mix) not in seen]
        named += [(f"{mix_name(one)}{_number_of(one, mixes)}", one.mix) for one in mixes]
        jobs = [make_contestant(opened, plan, name, "mix", mix, folder).overrides for name, mix in named]
    return [[*words, *variant, *overrides] for overrides in jobs]


def mix_name(one: FrontPoint) -> str:
    """Return the name of a mix in tables and plots: 'mix of 4.50 bits'."""
    return f"mix of {one.bits:.2f} bits"


def _number_of(one: FrontPoint, mixes: Sequence[FrontPoint]) -> str:
    """Return ' #2' for the second mix of the same name, whose recipe is another; '' for one alone."""
    same = [other for other in mixes if mix_name(other) == mix_name(one)]
    return f" #{same.index(one) + 1}" if len(same) > 1 else ""


def _formats_of(mix: Mix) -> tuple[str, ...]:
    return tuple(choice.format for choice in mix.choices)
