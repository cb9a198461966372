"""The table of a report as a Weights & Biases run: numbers that can be sorted and filtered there, pictures beside them.

    table      experiments: a row of the table each, with its images and its map of sensitivity
    images     sensitivity/<key>: the maps alone
    artifact   report-<names>: report.md, results.csv, table.tex and report.html, as far as they are there
    run        name: the report's; group: the sweep, of one; job type: report

Its id is made of the report's name, so that it is written over when the report is made again. Offline it lies in
<folder>/wandb, ready for `wandb sync` as the runs are.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qexp.config.schema import TrackingConfig
from qexp.config.wandb_names import cut
from qexp.metrics.registry import is_infinite
from qexp.report.marks import members_of
from qexp.report.selection import Selection
from qexp.report.table import TEXTS, Column, number_columns, table_cells
from qexp.results.rows import Row
from qexp.tracking.wandb_run import open_run, place_of, remove_older

TABLE = "experiments"
FILES = ("report.html", "report.md", "results.csv", "table.tex")
PICTURES = {"images": "images/grid.png", "difference": "images/difference.png", "sensitivity": "sensitivity.png"}
REPORT = "report"  # its job type


def log_table(wandb: Any, folder: Path, selection: Selection, prepared: list[Row], tracking: TrackingConfig) -> str:
    """Log the table as a run and return where it is: an address (online), or a folder.

    Args:
        folder: of the report; its files become an artifact.
        prepared: rows of the table, see `prepare_compared`.
    """
    sweeps = [sweep.name for sweep in selection.sweeps if sweep.folder]
    names = {
        "run_id": run_id(selection),
        "run_name": cut(f"report: {selection.title}"),
        "run_group": cut(sweeps[0]) if len(sweeps) == 1 else None,
        "run_job_type": REPORT,
        "run_tags": (REPORT, *tracking.tags),
    }
    with open_run(wandb, folder, tracking, names, {"sweeps": sweeps}) as run:
        rows = list(table_rows(prepared))
        data = [[wandb.Image(str(cell)) if isinstance(cell, Path) else cell for cell in row.values()] for row in rows]
        run.log({TABLE: wandb.Table(columns=list(rows[0]) if rows else [], data=data), **_maps(wandb, prepared)})
        artifact = wandb.Artifact(f"report-{run_id(selection)}", type=REPORT)
        for name in FILES:
            if (folder / name).is_file():
                artifact.add_file(str(folder / name))
        run.log_artifact(artifact)
        run.summary.update({"experiments": len(selection.rows)})
        place = place_of(run, tracking)
    remove_older(folder, keep=Path(run.settings.sync_dir))
    return place


def run_id(selection: Selection) -> str:
    """Return the id of the table's run, from the names of what is in it: W&B takes letters, digits and dashes."""
    names = repr(
        [(sweep.name, [row["key"] for row in sweep.rows] if not sweep.folder else None) for sweep in selection.sweeps]
    )
    return f"report-{hashlib.sha256(names.encode()).hexdigest()[:16]}"


def table_rows(prepared: list[Row]) -> Iterator[dict[str, Any]]:
    """Yield the table as W&B takes it: texts, numbers in the unit of their column, paths of pictures.

    A number has columns of its own for its standard deviation over seeds, its interval's ends and its n. A ratio that
    is infinite is empty, and `<column> is exact` is true.
    """
    columns = number_columns(prepared)
    for row, cells in zip(prepared, table_cells(prepared), strict=True):
        line: dict[str, Any] = {name: cells[name] for name in TEXTS if name in cells}
        line["reason"] = str(row["message"])
        line["key"] = ", ".join(str(member["key"]) for member in members_of(row))
        for name in (name for name in columns if name in cells):
            line |= _number_cells(row, columns[name], prepared)
        yield line | _pictures(row, prepared)


def _number_cells(row: Row, column: Column, prepared: list[Row]) -> dict[str, Any]:
    metric, head = column.metric, column.header
    if column.part == "versus":
        return {head: row.get("versus", {}).get(metric.name, "")}
    if column.part == "interval":
        low, high = row.get("intervals", {}).get(metric.name, (None, None))
        return {f"{head} low": _scaled(low, column), f"{head} high": _scaled(high, column)}
    cells: dict[str, Any] = {head: _scaled(row["metrics"].get(metric.name), column)}
    if any(metric.name in other.get("spread", {}) for other in prepared):
        cells[f"{head} ±"] = _scaled(row.get("spread", {}).get(metric.name), column)
    if metric.count_name and any(other["metrics"].get(metric.count_name) is not None for other in prepared):
        cells[f"{head} n"] = _number(row["metrics"].get(metric.count_name))
    if any(is_infinite(other["metrics"], metric) for other in prepared):
        cells[f"{head} is exact"] = is_infinite(row["metrics"], metric)
    return cells


def _scaled(value: float | None, column: Column) -> float | None:
    return None if value is None else _number(value * column.factor)


def _number(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _pictures(row: Row, prepared: list[Row]) -> dict[str, Path | None]:
    """Return column -> picture of the row's first run; the columns that any row has."""
    return {
        name: _picture(row, file)
        for name, file in PICTURES.items()
        if any(_picture(other, file) is not None for other in prepared)
    }


def _picture(row: Row, file: str) -> Path | None:
    folder = members_of(row)[0]["folder"]
    return folder / file if folder is not None and (folder / file).is_file() else None


def _maps(wandb: Any, prepared: list[Row]) -> Mapping[str, Any]:
    maps = {row["key"]: _picture(row, PICTURES["sensitivity"]) for row in prepared}
    return {f"sensitivity/{key}": wandb.Image(str(path)) for key, path in maps.items() if path is not None}
