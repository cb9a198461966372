"""What a fit prints and writes of its plan: tables as text and CSV, and the front as a plot."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qexp.fit.front import FrontPoint
from qexp.fit.mix import Mix
from qexp.fit.opened import OpenedModel
from qexp.fit.plan import FitPlan
from qexp.fit.request import Request
from qexp.predict.tables import formatted
from qexp.results.numbers import format_memory
from qexp.sensitivity.table import DENSE
from qexp.system.files import to_csv, write_bytes, write_json, write_text
from qexp.system.memory import GIB

COLORS = ("#0072B2", "#D55E00")  # of mixes, of uniform formats: told apart by color-blind eyes
FRONT_COLUMNS = ("kind", "name", "weights_bytes", "bits_per_weight", "predicted_error", "formats")


def plan_lines(
    opened: OpenedModel,
    request: Request,
    plan: FitPlan,
    chosen: FrontPoint,
    uniform: Sequence[FrontPoint],
    milliseconds: float,
) -> list[str]:
    """Return the plan as text: what was chosen from, the mix beside the uniform formats, and its memory."""
    header = plan.table.header
    layers = sum(len(group[0].layers) for group in plan.groups)
    lines = [
        f"{opened.name}: {request.bounds}; {layers} layers in {len(plan.groups)} groups, scores ({header.score}) of "
        f"{plan.place}, in {header.unit}",
        *(f"left out: {name}: {why}" for name, why in plan.model.left_out.items()),
        f"the program took {milliseconds:.0f} ms",
        "",
        formatted(_rows([chosen, *uniform], plan), 1, False),
        "",
        f"mix: {describe_formats(chosen.mix)}",
        memory_line(request, plan, chosen.mix),
    ]
    return lines


def describe_formats(mix: Mix) -> str:
    """'gguf Q4_0 × 12, none × 3': formats with their layers."""
    return ", ".join(f"{name} × {count}" for name, count in mix.formats.items())


def memory_line(request: Request, plan: FitPlan, mix: Mix) -> str:
    """Return the predicted bytes of a mix against what is asked for."""
    size = plan.size
    weights = size.fixed + mix.nbytes
    words = [
        f"predicted: weights {format_memory(weights / GIB)} ({size.bits(mix.nbytes):.3f} bits a weight of the layers)"
    ]
    if request.memory is not None:
        device = predicted_device_bytes(plan, mix)
        words.append(
            f"on the device at most {format_memory(device / GIB)}, of which {format_memory(size.beside / GIB)} "
            "to load or to run"
        )
    if mix.away:
        travels = sum(mix.travelling(size.extra))
        words.append(f"{len(mix.away)} groups travel, {format_memory(travels / GIB)} a step")
    return ", ".join(words)


def predicted_device_bytes(plan: FitPlan, mix: Mix) -> int:
    """Return the peak on the device: weights that rest there, slots, and what loading or running takes beside."""
    return plan.size.fixed + plan.limits.device_bytes_of(mix) + plan.size.beside


def _rows(points: Sequence[FrontPoint], plan: FitPlan) -> list[list[str]]:
    lines = [["format of the layers", "weights", "bits", "predicted error", "fits"]]
    for one in points:
        fits = (
            max(plan.limits.excess(one.mix)) <= 0 if plan.limits.travel_bytes is not None else one_fits(plan, one.mix)
        )
        error = "0" if one.mix.score == 0 else f"{one.mix.score:.3e}"
        name = {DENSE: "none (dense)"}.get(one.name, one.name)
        lines.append([name, format_memory(one.weights_bytes / GIB), f"{one.bits:.3f}", error, "yes" if fits else "no"])
    return lines


def one_fits(plan: FitPlan, mix: Mix) -> bool:
    """Return whether a mix keeps the bounds on bytes."""
    return plan.limits.device_bytes_of(mix) <= plan.limits.device_bytes


def write_plan(
    folder: Path,
    opened: OpenedModel,
    request: Request,
    plan: FitPlan,
    chosen: FrontPoint,
    front: Sequence[FrontPoint],
    uniform: Sequence[FrontPoint],
) -> None:
    """Write layers.csv, front.csv, front.png and plan.json of a fit."""
    layers = [
        {
            "component": one.component, "layer": layer, "format": one.format, "group_bytes": one.nbytes,
            "group_score": repr(one.score),
            "place": "away" if (one.component, one.group) in chosen.mix.away else "device",
        }
        for one in chosen.mix.choices
        for layer in one.layers
    ]  # fmt: skip
    write_text(folder / "layers.csv", to_csv(list(layers[0]), layers))
    rows = [_front_row(one, "uniform" if one.is_uniform else "mix") for one in (*front, *uniform)]
    write_text(folder / "front.csv", to_csv(FRONT_COLUMNS, rows))
    write_bytes(folder / "front.png", draw_front(opened.name, front, uniform, plan.table.header.unit))
    write_json(folder / "plan.json", plan_container(opened, request, plan, chosen.mix))


def plan_container(opened: OpenedModel, request: Request, plan: FitPlan, mix: Mix) -> dict[str, Any]:
    """Return the plan as JSON-able data."""
    return {
        "schema": 1,
        "model": opened.name,
        "overrides": list(opened.overrides),
        "bounds": request.bounds,
        "scores": str(plan.place),
        "predicted": {
            "weights_bytes": plan.size.fixed + mix.nbytes,
            "device_bytes": predicted_device_bytes(plan, mix),
            "beside_bytes": plan.size.beside,
            "bits_per_weight": plan.size.bits(mix.nbytes),
            "error": mix.score,
            "travelling_bytes": sum(mix.travelling(plan.size.extra)),
        },
        "formats": mix.formats,
        "left_out": dict(plan.model.left_out),
    }


def _front_row(one: FrontPoint, kind: str) -> dict[str, object]:
    return {
        "kind": kind,
        "name": one.name,
        "weights_bytes": one.weights_bytes,
        "bits_per_weight": f"{one.bits:.4f}",
        "predicted_error": repr(one.mix.score),
        "formats": describe_formats(one.mix),
    }


def draw_front(title: str, front: Sequence[FrontPoint], uniform: Sequence[FrontPoint], unit: str) -> bytes:
    """Plot predicted error against bits, as PNG: mixes as a line, uniform formats as named points."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.2), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(f"{title}: a format for each layer, and one for all", loc="left", fontweight="bold")
    axes.set_xlabel("bits of a weight, over the layers that formats are chosen for")
    axes.set_ylabel(f"predicted error ({unit})")
    axes.set_yscale("log")
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    mixes, others = ([one for one in points if one.mix.score > 0] for points in (front, uniform))
    axes.plot(
        [one.bits for one in mixes], [one.mix.score for one in mixes], "o-", color=COLORS[0], label="mix", markersize=4
    )
    axes.plot([one.bits for one in others], [one.mix.score for one in others], "s", color=COLORS[1], label="one format")
    for one in others:
        axes.annotate(one.name, (one.bits, one.mix.score), xytext=(5, 4), textcoords="offset points", fontsize=8)
    axes.legend(frameon=False)
    data = io.BytesIO()
    figure.savefig(data, format="png", metadata={"Software": None})
    return data.getvalue()
