"""Prove a plan and answer: run the contestants, decide, write the files, and print the command line to use."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

from qexp.errors import ConfigError
from qexp.fit.additivity import Additivity, measure_additivity, random_mixes
from qexp.fit.contestants import contestants_of, make_contestant, recommended_overrides
from qexp.fit.held_out import proof_variants
from qexp.fit.mix import formats_of, uniform_mix
from qexp.fit.opened import OpenedModel
from qexp.fit.outcome import describe_formats, one_fits, plan_container, predicted_device_bytes
from qexp.fit.plan import FitPlan, choose_mix, plan_fit, within
from qexp.fit.proof import Proven, compared_metric, run_proof
from qexp.fit.recipes import shell_line
from qexp.fit.request import Request
from qexp.fit.saved import save_recommended, with_less
from qexp.fit.scores import make_scores
from qexp.fit.search import contestants_for_quality
from qexp.fit.verdict import Verdict, decide
from qexp.metrics.registry import Metric
from qexp.predict.tables import formatted
from qexp.results.numbers import format_memory
from qexp.results.uncertainty import PairedComparison
from qexp.sensitivity.table import DENSE
from qexp.system.files import to_csv, write_bytes, write_json, write_text
from qexp.system.memory import GIB

ROUNDS = 3  # of mixes chosen again because what was measured is over memory=
COLORS = {"mix": "#0072B2", "uniform": "#D55E00", "rule": "#009E73"}


def prove_and_answer(opened: OpenedModel, request: Request, plan: FitPlan, folder: Path) -> None:
    """Run the proof and print the recommendation. Raises: ConfigError where nothing can be recommended."""
    variants = proof_variants(opened, plan.table, plan.place, folder, request.seeds)
    sweep = f"fit_{folder.name}"
    mixes = [
        make_contestant(opened, plan, f"random {number}", "mix", one, folder)
        for number, one in enumerate(random_mixes(plan.groups), start=1)
    ]
    tried = run_proof(opened, mixes, variants[:1], f"{sweep}_additivity")
    additivity = measure_additivity(tried, plan.table.header.error)
    print(additivity, flush=True)
    write_json(folder / "additivity.json", additivity.to_container())
    plan = within(plan, request, median([one.step_ms for one in tried if not one.problem] or [0.0]))
    plans = {"mix": plan}
    if not additivity.holds and request.quality is None:
        plans |= _plan_from_base(opened, request, plan)
    asked = request
    for _ in range(ROUNDS):
        proven, plan, request = _prove(opened, request, plans, folder, variants, sweep)
        wanted = request.quality.metric if request.quality is not None else None
        verdict = decide(proven, compared_metric(proven, wanted), request, plan.size)
        _write(folder, opened, asked, plan, proven, verdict, additivity)
        print("\n".join(["", *answer_lines(opened, plan, proven, verdict, folder)]), flush=True)
        if not request.saving:
            return
        saved = save_recommended(opened, asked, plan, verdict.best, variants[0], sweep)
        size = format_memory(saved.weights_bytes / GIB)
        if not saved.excess:
            write_json(folder / "saved.json", {"folder": str(saved.folder), "weights_bytes": saved.weights_bytes})
            print(f"saved: {saved.folder}, weights in its files {size}", flush=True)
            return
        over = f"its files hold {size} of weights, which is {format_memory(saved.excess / GIB)} over {asked.bounds}"
        print(f"{over}; choosing again with that much less", flush=True)
        request = with_less(request, saved.excess, plan)
        try:
            plans = {name: within(one, request) for name, one in plans.items()}
        except ConfigError:  # it names a bound that nobody gave
            break
    raise ConfigError(f"{over}, and no other mix was found; it is left there. Give a lower bound, or other formats=[…]")


def _prove(
    opened: OpenedModel,
    request: Request,
    plans: Mapping[str, FitPlan],
    folder: Path,
    variants: Sequence[Sequence[str]],
    sweep: str,
) -> tuple[list[Proven], FitPlan, Request]:
    """Run the contestants; where the mix takes more than memory=, choose again with what was measured.

    plans: name of a mix -> what it is chosen by; the first one's bytes are those of all.
    """
    for _ in range(ROUNDS):
        plan = next(iter(plans.values()))
        if request.quality is not None:
            contestants = contestants_for_quality(opened, plan, request, folder, variants, sweep)
        else:
            mixes = {name: choose_mix(one, request) for name, one in plans.items()}
            contestants = contestants_of(opened, plan, mixes, folder)
        proven = run_proof(opened, contestants, variants, sweep)
        beside = max((one.peak_bytes - one.weights_bytes for one in proven if not one.problem), default=0)
        if request.memory is None or beside <= plan.size.beside:
            break
        print(f"measured: {format_memory(beside / GIB)} beside the weights; choosing again with that", flush=True)
        request = replace(request, activations=beside)
        plans = {name: within(one, request) for name, one in plans.items()}
    return proven, plan, request


def _plan_from_base(opened: OpenedModel, request: Request, plan: FitPlan) -> dict[str, FitPlan]:
    """Make scores with all other layers in the largest uniform format that fits, around which errors do add up."""
    by_size = sorted(formats_of(plan.groups), key=lambda name: uniform_mix(plan.groups, name).nbytes)
    fitting = [name for name in by_size if one_fits(plan, uniform_mix(plan.groups, name))]
    base = (fitting or by_size)[-1 if fitting else 0]
    score = "final" if plan.table.header.score == "final" else "exact"
    print(f"so {score} scores are made with all other layers in {base}, for a second mix", flush=True)
    backends = {choice.format: choice.backend for group in plan.groups for choice in group if choice.format != DENSE}
    backends[base] = backends.pop(base)  # the last one
    place = make_scores(opened, request, score, backends)
    return {f"mix around {base}": within(plan_fit(opened, request, place, plan.bandwidth), request, plan.compute_ms)}


def answer_lines(
    opened: OpenedModel, plan: FitPlan, proven: Sequence[Proven], verdict: Verdict, folder: Path
) -> list[str]:
    """Return the table of the proof, what is recommended, and how to use it."""
    best, metric = verdict.best, verdict.metric
    found = dict.fromkeys((one.contestant.name for one in proven), "")
    found |= {other.contestant.name: describe(comparison, metric) for other, comparison in verdict.against}
    found |= {name: f"out: {why}" for name, why in verdict.over.items()}
    found[best.contestant.name] = "recommended"
    head = [
        "setting",
        "weights",
        "bits",
        metric.header.format(unit=metric.unit) or metric.short_name,
        "the recommended one",
    ]
    rows = [
        _row(one, plan, metric, found[one.contestant.name]) for one in sorted(proven, key=lambda o: o.weights_bytes)
    ]
    lines = [formatted([head, *rows], 1, False), "", *_recommendation(verdict)]
    lines += [_memory(plan, best)]
    words = [*opened.overrides, *recommended_overrides(opened, plan, best.contestant.mix, folder)]
    return [*lines, f"  {shell_line(words)}", f"files: {folder}"]


def _recommendation(verdict: Verdict) -> list[str]:
    best = verdict.best
    lines = [f"recommended: {best.contestant.name} ({describe_formats(best.contestant.mix)})"]
    if verdict.undecided:
        lines.append(
            f"not decided between it and: {', '.join(verdict.undecided)} (95 % intervals of the difference hold 0)"
        )
    return lines


def _memory(plan: FitPlan, best: Proven) -> str:
    predicted = plan.size.fixed + best.contestant.mix.nbytes
    return (
        f"weights: predicted {format_memory(predicted / GIB)}, loaded {format_memory(best.weights_bytes / GIB)}; peak: "
        f"predicted at most {format_memory(predicted_device_bytes(plan, best.contestant.mix) / GIB)}, measured "
        f"{format_memory(best.peak_bytes / GIB)}"
    )


def describe(comparison: PairedComparison, metric: Metric) -> str:
    """'better by 4.2 dB (3.9 to 4.5)', of the recommended one."""
    if comparison.difference is None:
        return comparison.verdict
    unit = f" {metric.unit}" if metric.unit else ""
    interval = comparison.interval
    shown = f" ({interval[0]:+.3g} to {interval[1]:+.3g})" if interval is not None else ""
    return f"{comparison.verdict}: {comparison.difference:+.3g}{unit}{shown}"


def _row(one: Proven, plan: FitPlan, metric: Metric, what: str) -> list[str]:
    mix = one.contestant.mix
    mean = f"{one.mean(metric):.5g}" if metric.name in one.samples else "–"
    weights = format_memory((one.weights_bytes or plan.size.fixed + mix.nbytes) / GIB)
    return [one.contestant.name, weights, f"{plan.size.bits(mix.nbytes):.3f}", mean, what]


def _write(
    folder: Path,
    opened: OpenedModel,
    request: Request,
    plan: FitPlan,
    proven: Sequence[Proven],
    verdict: Verdict,
    additivity: Additivity,
) -> None:
    metric = verdict.metric
    compared = {other.contestant.name: comparison for other, comparison in verdict.against}
    rows = [_container(one, plan, metric, compared.get(one.contestant.name), verdict) for one in proven]
    write_text(folder / "proof.csv", to_csv(list(rows[0]), rows))
    write_bytes(folder / "proof.png", draw_proof(opened.name, proven, metric))
    plain = plan_container(opened, request, plan, verdict.best.contestant.mix)
    recommended = {"name": verdict.best.contestant.name, "undecided": verdict.undecided, "metric": metric.name}
    measured = {"weights_bytes": verdict.best.weights_bytes, "peak_bytes": verdict.best.peak_bytes}
    content = {**plain, "recommended": recommended, "measured": measured, "additivity": additivity.to_container()}
    write_json(folder / "fit.json", content)


def _container(
    one: Proven, plan: FitPlan, metric: Metric, comparison: PairedComparison | None, verdict: Verdict
) -> dict[str, object]:
    mix, name = one.contestant.mix, one.contestant.name
    interval = comparison.interval if comparison is not None else None
    return {
        "name": name,
        "kind": one.contestant.kind,
        "predicted_weights_bytes": plan.size.fixed + mix.nbytes,
        "weights_bytes": one.weights_bytes,
        "peak_bytes": one.peak_bytes,
        "bits_per_weight": f"{plan.size.bits(mix.nbytes):.4f}",
        "predicted_error": repr(mix.score),
        metric.name: repr(one.mean(metric)) if metric.name in one.samples else "",
        "step_ms": one.step_ms,
        "recommended_against_it": comparison.verdict if comparison is not None else "",
        "difference": comparison.difference if comparison is not None else None,
        "difference_low": interval[0] if interval is not None else None,
        "difference_high": interval[1] if interval is not None else None,
        "out": verdict.over.get(name, ""),
        "overrides": shell_line(one.contestant.overrides).removeprefix("python -m qexp "),
    }


def draw_proof(title: str, proven: Sequence[Proven], metric: Metric) -> bytes:
    """Measured quality against memory of the weights, as PNG: mixes, uniform formats and the rule by hand."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.2), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(f"{title}: proof", loc="left", fontweight="bold")
    axes.set_xlabel("weights (MiB)")
    axes.set_ylabel(metric.axis or f"{metric.short_name} {metric.unit}".strip())
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    done = [one for one in proven if metric.name in one.samples and abs(one.mean(metric)) != float("inf")]
    for kind, color in COLORS.items():
        own = [one for one in done if one.contestant.kind == kind]
        places = [one.weights_bytes / (1 << 20) for one in own], [one.mean(metric) for one in own]
        axes.plot(*places, "o", color=color, label=kind)
    for one in done:
        place = one.weights_bytes / (1 << 20), one.mean(metric)
        axes.annotate(one.contestant.name, place, xytext=(5, 4), textcoords="offset points", fontsize=8)
    if metric.better == "lower" and all(one.mean(metric) > 0 for one in done):
        axes.set_yscale("log")
    axes.legend(frameon=False)
    data = io.BytesIO()
    figure.savefig(data, format="png", metadata={"Software": None})
    return data.getvalue()
