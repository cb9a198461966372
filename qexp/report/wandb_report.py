"""A sweep as a Weights & Biases report: an introduction, and panels over the sweep's runs.

    memory against quality   a scatter plot; bars of memory, quality, time and the peak of loading
    images                   the samples of every run, their reference and the difference (generate)
    layers                   the table of every layer (roundtrip)

The run set is the sweep's runs by their ids: those it reused are in the group of the sweep that ran them. Online the
report is saved, and updated when this is repeated. Offline its specification is written as wandb_report.json beside the
sweep: what would be saved, without an account or a network.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qexp.errors import ConfigError, MissingLibraryError
from qexp.metrics.registry import Metric, all_metrics
from qexp.report.markdown import report_intro
from qexp.results.rows import Row, read_manifest
from qexp.system.files import read_json, write_json
from qexp.tracking.session import clear_errors, require_login, wandb_session

FILE_NAME = "wandb_report.json"
MEMORY = "memory/weights_gib"
BARS = ("time/step_ms", "load/peak_host_gib", "quality/class_accuracy")  # beside what the plots show
MEDIA = ("images/grid", "images/reference", "images/difference")


def publish_report(outputs: Path, name: str, rows: list[Row], *, online: bool | None = None) -> str:
    """Build the report and save it (online) or write its specification; returns a line that says where it is.

    online: None for as the runs were tracked.
    Raises: ConfigError if no run was tracked, or without an API key; UnsupportedError if the server does not answer.
    """
    folder = outputs / "sweeps" / name
    tracking = _tracking(rows, name)
    mode = tracking["mode"] if online is None else ("online" if online else "offline")
    known = read_json(folder / FILE_NAME) or {}
    stored = {"id": known.get("id"), "url": known.get("url")}
    not_saved = f"the W&B report of sweep {name} is not saved"
    with clear_errors(not_saved, "leave out --online for its specification"), wandb_session(folder, mode) as wandb:
        entity = ""
        if mode == "online":
            require_login(wandb)
            entity = tracking["entity"] or wandb.Api().default_entity
        report = _build(read_manifest(outputs, name), rows, tracking["project"], entity)
        spec = _spec(report)
        if mode == "online":
            stored = _save_report(report, stored["id"])
    write_json(folder / FILE_NAME, {"title": report.title, "project": report.project, **stored, "spec": spec})
    return f"W&B report: {stored['url']}" if mode == "online" else f"wrote {folder / FILE_NAME}"


def _tracking(rows: list[Row], name: str) -> Mapping[str, Any]:
    """Return the tracking settings of the sweep, from a run it made itself if there is one."""
    stored = [row["config"]["tracking"] for row in sorted(rows, key=lambda row: row["reused"]) if row["config"]]
    tracked = [tracking for tracking in stored if tracking["mode"] != "none"]
    if not tracked:
        raise ConfigError(
            f"sweep {name!r} has no run that was tracked; run it with tracking=offline or tracking=online"
        )
    found: Mapping[str, Any] = tracked[0]
    return found


def _build(manifest: Mapping[str, Any], rows: list[Row], project: str, entity: str) -> Any:
    wr = _import_reports()
    name = manifest["name"]
    runs = wr.Runset(name=name, project=project if entity else "", entity=entity, filters=_filter(rows))
    blocks = [wr.MarkdownBlock(report_intro(manifest, rows)), wr.H2("Memory against quality")]
    blocks.append(wr.PanelGrid(runsets=[runs], panels=_plots(wr, rows)))
    tasks = {row["config"]["task"]["name"] for row in rows if row["config"]}
    if "generate" in tasks:
        images = wr.MediaBrowser(title="samples", media_keys=list(MEDIA), num_columns=3, layout=wr.Layout(w=24, h=14))
        blocks += [wr.H2("Images"), wr.PanelGrid(runsets=[runs], panels=[images])]
    if "roundtrip" in tasks:
        layers = wr.WeavePanelSummaryTable(table_name="layers", layout=wr.Layout(w=24, h=14))
        blocks += [wr.H2("Layers"), wr.PanelGrid(runsets=[runs], panels=[layers])]
    return wr.Report(project=project, entity=entity, title=f"qexp: {name}"[:128], width="fluid", blocks=blocks)


def _filter(rows: list[Row]) -> str:
    return f"Metric('ID') in {list(dict.fromkeys(row['key'] for row in rows if row['config']))!r}"


def _plots(wr: Any, rows: list[Row]) -> list[Any]:
    """Return panels for the metrics that have a value in some run."""
    measured = {metric for row in rows for metric, value in row["metrics"].items() if value is not None}
    shown = {
        name: metric for name, metric in all_metrics().items() if name in measured and (metric.axis or name in BARS)
    }
    scatters = [
        wr.ScatterPlot(
            title=f"memory of the weights against {_title(metric)}",
            x=wr.SummaryMetric(MEMORY),
            y=wr.SummaryMetric(name),
            layout=wr.Layout(w=24, h=10),
        )
        for name, metric in shown.items()
        if metric.axis and name != MEMORY and MEMORY in measured
    ]
    bars = [
        wr.BarPlot(title=_title(metric), metrics=[wr.SummaryMetric(name)], layout=wr.Layout(w=12, h=8))
        for name, metric in shown.items()
    ]
    return [*scatters, *bars]


def _title(metric: Metric) -> str:
    """Return a panel's title, with the unit in which W&B stores the metric."""
    return metric.axis.format(unit=metric.unit) or f"{metric.meaning}{f' ({metric.unit})' if metric.unit else ''}"


def _spec(report: Any) -> Any:
    """Return the specification that W&B stores, by a private method: a report has no public offline form."""
    try:
        model = report._to_model()
    except ValueError as error:  # online only: the project is looked up
        raise ConfigError(
            f"W&B project {report.entity}/{report.project} cannot be used ({error}); upload the runs first: "
            "wandb sync outputs/runs/*/wandb/offline-run-*"
        ) from error
    return json.loads(model.spec.model_dump_json(by_alias=True, exclude_none=True))


def _save_report(report: Any, known_id: str | None) -> dict[str, Any]:
    """Save the report, over the one that was saved from this sweep before."""
    if known_id is not None:
        report.id = known_id
    report.save()
    return {"id": report.id, "url": report.url}


def _import_reports() -> Any:
    try:
        import wandb_workspaces.reports.v2 as reports
    except ImportError as error:
        raise MissingLibraryError(
            f"a W&B report needs wandb-workspaces ({error}); pip install wandb-workspaces"
        ) from error
    return reports
