"""One fit from question to answer: plan, scores, program, proof, and the files that it leaves."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

from qexp.config.recipe import format_name
from qexp.errors import ConfigError
from qexp.fit.bandwidth import measured_bandwidth
from qexp.fit.contestants import recommended_overrides
from qexp.fit.front import mixed_front, point, uniform_points
from qexp.fit.held_out import check_provable
from qexp.fit.opened import OpenedModel, find_save_folder, open_model
from qexp.fit.outcome import plan_lines, write_plan
from qexp.fit.plan import check_bounds, check_recipe, plan_fit, timed_choice
from qexp.fit.recipes import shell_line
from qexp.fit.request import Request
from qexp.fit.scores import find_scores, make_scores, score_of
from qexp.system.files import check_writable
from qexp.system.screen import library_output_in
from qexp.tasks.sensitivity import default_formats


def run_fit(request: Request, *, is_plan: bool) -> None:
    """Choose, and unless only a plan is asked for, prove it; prints the answer and writes its files.

    Raises: QexpError, or what Hydra raises for overrides.
    """
    with open_model(request) as opened:
        if opened.is_published and not is_plan:
            raise ConfigError(
                f"the weights of {opened.config.model.path} are not on this machine, so that nothing can be proven; "
                "add --plan with scores=, or download them: hf download"
            )
        if (saves_to := find_save_folder(opened, request)) is not None:
            if is_plan:
                raise ConfigError(f"{' '.join(request.saving)}: with --plan no weight is read; leave one of them out")
            check_writable(saves_to, "save.path=")  # not only after the proof
        if not is_plan:
            check_provable(opened)
        folder = fit_folder(opened, request)
        place = scores_of(opened, request, is_plan=is_plan)
        bandwidth = request.bandwidth or (measured_bandwidth(opened.config.device) if request.step_ms else None)
        with _quiet():
            plan = plan_fit(opened, request, place, bandwidth)
            mix, milliseconds = timed_choice(plan, request)
            check_recipe(opened, plan, mix)
            front, uniform = mixed_front(plan.groups, plan.size), uniform_points(plan.groups, plan.size)
        chosen = point("mix", mix, plan.size)
        write_plan(folder, opened, request, plan, chosen, front, uniform)
        print("\n".join(plan_lines(opened, request, plan, chosen, uniform, milliseconds)), flush=True)
        if is_plan:
            words = [*opened.overrides, *recommended_overrides(opened, plan, mix, folder)]
            print(f"\nnot proven. To use it:\n  {shell_line(words)}\nfiles: {folder}")
            return
        from qexp.fit.answer import prove_and_answer

        prove_and_answer(opened, request, plan, folder)


def fit_folder(opened: OpenedModel, request: Request) -> Path:
    """outputs/fit/<model>_<bounds>: the same question again is answered in the same place."""
    words = re.sub(r"[^\w.-]+", "-", f"{opened.name}_{request.bounds}")
    return Path(opened.config.paths.outputs, "fit", words).resolve()


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what libraries print while models are planned."""
    with TemporaryFile() as log, library_output_in(log):
        yield


def scores_of(opened: OpenedModel, request: Request, *, is_plan: bool) -> Path:
    """Return the folder with scores: as asked for, the latest that are of this model, or new ones.

    is_plan: none are made. Raises: ConfigError where there are none, or the smallest formats are over a bound.
    """
    if request.scores is not None:
        return request.scores
    formats = request.formats or {format_name(config): config for config in default_formats()}
    with _quiet():
        model = check_bounds(opened, request, formats)
        found = find_scores(opened, model, request)
    if found is not None:
        return found
    if is_plan or opened.is_published:
        raise ConfigError(
            f"{Path(opened.config.paths.outputs, 'runs')} has no scores of this model with these settings (layers, "
            "samples, groups=, formats=, score=), and making them reads weights; leave --plan (or sweep.dry_run) out, "
            "or give a finished run of task=sensitivity: scores=<folder>"
        )
    return make_scores(opened, request, score_of(opened, model, request))
