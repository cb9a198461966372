"""Sweeps as a Weights & Biases report: the text of report.md, and panels over the runs of each sweep.

    memory against quality   a scatter plot; parallel coordinates of settings and results; bars of memory, quality, time
                             and the peak of loading; the table (`wandb_table.py`)
    images                   the samples of every run, their reference and the difference (generate)
    sensitivity              the map of every run (sensitivity)
    layers                   the table of every layer (roundtrip)

A run set is a sweep's runs by their ids: those it reused are in the group of the sweep that ran them. Online the report
is saved, and updated when this is repeated. Offline its specification is written as wandb_report.json beside the
report: what would be saved, without an account or a network.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qexp.config.schema import TrackingConfig
from qexp.errors import ConfigError, MissingLibraryError
from qexp.metrics.registry import Metric, all_metrics
from qexp.report.markdown import report_markdown
from qexp.report.results_csv import varying_settings
from qexp.report.selection import Selection
from qexp.report.wandb_table import TABLE, log_table, run_id
from qexp.results.rows import Row
from qexp.system.files import read_json, write_json
from qexp.tracking.session import clear_errors, require_login, wandb_session

FILE_NAME = "wandb_report.json"
MEMORY = "memory/weights_gib"
BARS = ("time/step_ms", "load/peak_host_gib", "quality/class_accuracy")  # beside what the plots show
SETTINGS = 6  # axes of settings in the plot of parallel coordinates
MAPS = ("images/sensitivity",)
MEDIA = ("images/grid", "images/reference", "images/difference")


def publish_report(selection: Selection, prepared: list[Row], folder: Path, *, online: bool | None = None) -> list[str]:
    """Log the table as a run, build the report, and save it (online) or write its specification.

    Args:
        prepared: rows of the table, see `prepare_compared`.
        folder: of the report's files.
        online: None for as the runs were tracked.

    Returns: lines that say where the table and the report are.
    Raises: ConfigError if no run was tracked, or without an API key; UnsupportedError if the server does not answer.
    """
    tracking = _tracking(selection)
    mode = tracking.mode if online is None else ("online" if online else "offline")
    tracking = replace(tracking, mode=mode)
    known = read_json(folder / FILE_NAME) or {}
    stored = {"id": known.get("id"), "url": known.get("url")}
    not_saved = f"the W&B report of {selection.title} is not saved"
    with clear_errors(not_saved, "leave out --online for its specification"), wandb_session(folder, mode) as wandb:
        entity = ""
        if mode == "online":
            require_login(wandb)
            entity = tracking.entity or wandb.Api().default_entity
        report = _build(selection, prepared, folder, tracking.project, entity)
        spec = _spec(report)
        place = log_table(wandb, folder, selection, prepared, tracking)
        if mode == "online":
            stored = _save_report(report, stored["id"])
    write_json(folder / FILE_NAME, {"title": report.title, "project": report.project, **stored, "spec": spec})
    return [
        f"W&B table: {place.removeprefix(f'{Path.cwd()}/')}",
        f"W&B report: {stored['url']}" if mode == "online" else f"wrote {folder / FILE_NAME}",
    ]


def _tracking(selection: Selection) -> TrackingConfig:
    """Return the tracking settings of the runs, from one that a sweep made itself if there is one."""
    rows = sorted(selection.rows, key=lambda row: row["reused"])
    stored = [row["config"]["tracking"] for row in rows if row["config"]]
    tracked = next((tracking for tracking in stored if tracking["mode"] != "none"), None)
    if tracked is None:
        raise ConfigError(
            f"{selection.title!r} has no run that was tracked; run it with tracking=offline or tracking=online"
        )
    return TrackingConfig(tracked["mode"], tracked["project"], tracked["entity"], tuple(tracked["tags"]))


def _build(selection: Selection, prepared: list[Row], folder: Path, project: str, entity: str) -> Any:
    wr = _import_reports()
    place = {"project": project if entity else "", "entity": entity}
    sets = [wr.Runset(name=sweep.name, filters=_filter(sweep.rows), **place) for sweep in selection.sweeps]
    table = wr.Runset(name="report", filters=f"Metric('ID') in {[run_id(selection)]!r}", **place)
    intro, rest = _report_text(selection, prepared, folder)
    blocks = [wr.MarkdownBlock(intro), wr.H2("Memory against quality")]
    blocks.append(wr.PanelGrid(runsets=sets, panels=_plots(wr, selection.rows)))
    blocks.append(wr.PanelGrid(runsets=[table], panels=[_table_panel(wr, TABLE)]))
    tasks = {row["config"]["task"]["name"] for row in selection.rows if row["config"]}
    shown = {"generate": ("Images", MEDIA), "sensitivity": ("Sensitivity", MAPS)}
    for title, keys in (found for task, found in shown.items() if task in tasks):
        media = wr.MediaBrowser(title=title, media_keys=list(keys), num_columns=3, layout=wr.Layout(w=24, h=14))
        blocks += [wr.H2(title), wr.PanelGrid(runsets=sets, panels=[media])]
    if "roundtrip" in tasks:
        blocks += [wr.H2("Layers"), wr.PanelGrid(runsets=sets, panels=[_table_panel(wr, "layers")])]
    blocks.append(wr.MarkdownBlock(rest))
    title = f"qexp: {selection.title}"[:128]
    return wr.Report(project=project, entity=entity, title=title, width="fluid", blocks=blocks)


def _table_panel(wr: Any, name: str) -> Any:
    return wr.WeavePanelSummaryTable(table_name=name, layout=wr.Layout(w=24, h=14))


def _report_text(selection: Selection, prepared: list[Row], folder: Path) -> tuple[str, str]:
    """Return the introduction of report.md and the rest, without plots and links, which lead to local files."""
    text = report_markdown(selection, prepared, folder, [])
    intro, mark, rest = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text).partition("\n## ")
    return intro, mark.lstrip() + rest


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
    return [*scatters, *_parallel(wr, rows, shown), *bars]


def _parallel(wr: Any, rows: list[Row], metrics: Mapping[str, Metric]) -> list[Any]:
    """Make the panel with a line for each run through settings that vary and metrics; none for fewer than two."""
    settings = [wr.ParallelCoordinatesPlotColumn(metric=wr.Config(name)) for name in varying_settings(rows)[:SETTINGS]]
    numbers = [
        wr.ParallelCoordinatesPlotColumn(metric=wr.SummaryMetric(name), display_name=_title(metric))
        for name, metric in metrics.items()
    ]
    plot = wr.ParallelCoordinatesPlot(
        title="settings and results", columns=[*settings, *numbers], layout=wr.Layout(w=24, h=10)
    )
    return [plot] if numbers and len(settings) + len(numbers) > 1 else []


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
