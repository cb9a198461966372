"""results.csv of a sweep: a line per experiment, with every metric and every setting that differs between them.

Metrics keep their names and units (`memory/weights_gib`); settings are dotted paths
(`components.transformer.backend.label`), lists and mappings as JSON. A value that is null or was never reached is an
empty cell. `environment` says how versions, commit, threads or machine differ from those of most runs. `<metric>_low`
and `_high` are the ends of the 95 % interval of a run's metric; `<metric>_versus` says how its row in the table
compares with the baseline. Each run has its line; `group` is the same for runs that differ in their seed alone, the key
of their first. `folder` is the run's, from where the file is; `sweep`, where several are in it, the run's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qexp.errors import DamagedFileError
from qexp.metrics.registry import metric_order
from qexp.report.marks import differing_environments
from qexp.report.seeds import NOT_SETTINGS, seed_groups
from qexp.results.labels import backend_label, offload_label
from qexp.results.rows import GONE, Row
from qexp.system.files import read_csv, to_csv

FIRST = (
    *("number", "key", "group", "status", "reason", "message", "reused", "seconds"),
    *("environment", "backend", "offload"),
)


def results_csv(rows: list[Row], place: Path | None = None) -> str:
    """Return the text of results.csv. place: the folder that it will be in, for the paths of the runs."""
    where = [*(["sweep"] if any("sweep" in row for row in rows) else []), *(["folder"] if place else [])]
    settings = varying_settings(rows)
    metrics = sorted({name for row in rows for name in row["metrics"]}, key=metric_order)
    columns = [column for name in metrics for column in _metric_columns(name, rows)]
    names = [*FIRST, *where, *settings, *columns]
    groups, differing = seed_groups(rows), differing_environments(rows)
    lines = []
    for row, values in zip(rows, _flat_configs(rows), strict=True):
        cells = {
            **row, **_label_columns(row), **values, **_metric_cells(row),
            "group": groups.get(row["number"], ""), "environment": differing.get(row["number"]),
            "folder": os.path.relpath(row["folder"], place) if row["folder"] and place else None,
        }  # fmt: skip
        lines.append({name: _csv_cell(cells.get(name)) for name in names})
    return to_csv(names, lines)


def lost_runs(path: Path, rows: list[Row]) -> list[Path]:
    """Return the folders of the runs whose numbers are left in an earlier results.csv alone.

    Those of the sweep that are missing or damaged, and those of an earlier sweep of its name that are not there.
    Raises: DiskError if the file cannot be read. One that is no CSV has no numbers.
    """
    try:
        done = [line for line in read_csv(path) or () if line.get("status") == "done" and line.get("key")]
    except DamagedFileError:
        return []
    gone = {row["key"]: row["status"] in (*GONE, "skipped") for row in rows}
    runs = {str(line["key"]): _folder_of(line, path) for line in done}
    return [run for key, run in runs.items() if gone.get(key, not (run / "result.json").exists())]


def _folder_of(line: Mapping[str, str], path: Path) -> Path:
    """Return the run folder of a line; without its folder, of an earlier version: where the runs of a sweep are."""
    if line.get("folder"):
        return Path(os.path.normpath(path.parent / line["folder"]))
    return path.absolute().parent.parent.parent / "runs" / line["key"]


def _metric_columns(name: str, rows: list[Row]) -> list[str]:
    """Return a metric, the ends of its interval, and its comparison with the baseline, if any row has these."""
    parts = {"_low": "intervals", "_high": "intervals", "_versus": "versus"}
    return [name, *(name + end for end, part in parts.items() if any(name in row.get(part, {}) for row in rows))]


def _metric_cells(row: Row) -> dict[str, Any]:
    cells = dict(row["metrics"])
    for name, (low, high) in row.get("intervals", {}).items():
        cells |= {f"{name}_low": low, f"{name}_high": high}
    return cells | {f"{name}_versus": verdict for name, verdict in row.get("versus", {}).items()}


def varying_settings(rows: list[Row]) -> list[str]:
    """Dotted paths of the settings with more than one value over the sweep, in the order of the configuration.

    A setting that only some have (a field of one backend) counts by the values of those that have it.
    """
    configs = [flat for row, flat in zip(rows, _flat_configs(rows), strict=True) if row["config"] is not None]
    names = dict.fromkeys(name for flat in configs for name in flat)
    return [name for name in names if len({_csv_cell(flat[name]) for flat in configs if name in flat}) > 1]


def _flat_configs(rows: list[Row]) -> list[dict[str, Any]]:
    settings = [{k: v for k, v in (row["config"] or {}).items() if k not in NOT_SETTINGS} for row in rows]
    return [dict(flatten_config(config)) for config in settings]


def flatten_config(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, value) of every setting in a stored configuration; an empty mapping is a value."""
    for name, item in value.items():
        if isinstance(item, Mapping) and item:
            yield from flatten_config(item, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", item


def _label_columns(row: Row) -> dict[str, str]:
    if row["config"] is None:
        return {"backend": "", "offload": ""}
    return {"backend": backend_label(row["config"]), "offload": offload_label(row["config"])}


def _csv_cell(value: Any) -> str:
    if value is None:
        return ""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict | bool) else str(value)
