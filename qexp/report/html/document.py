"""Everything that report.html shows, as one JSON document.

    title
    sweeps      {name, summary, notes, command}: texts, '' where there is none
    columns     of the table: `columns.py`
    rows        {number, key, name, is_done, status, message, family, marker, is_busy, other, runs, folder}: number is
                a text ('1-3, 5'); other says how its environment differs from that of most; runs are places in `runs`;
                folder is a link relative to the page
    runs        {number, key, seed, row, command, typed, config, env}: one experiment each; config and env are what
                differs from `base`, null for a setting that the run does not have
    base        {config, env}: what most runs have
    families    {name, light, dark}: colors of backends, in the order of the table
    sorted_by   the column that the table is sorted by when the page opens
    plot        {x, y, choices}: metrics of the plot; choices are {label, x, y}
    footnotes   lines below the table
    pictures    `pictures.py`; texts: `texts.py`; steps: a list, `steps.py`; maps: a list, `heatmaps.py`
    warnings    files that could not be used

Places in lists stand for things: a row is its place in `rows`. The document holds no text that is HTML: everything is
shown as it is.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from qexp.errors import DiskError
from qexp.report.comparison import comparison_notes
from qexp.report.html import settings
from qexp.report.html.appearance import family_colors, offload_marker
from qexp.report.html.columns import Column, family_of, member_rows, table_columns
from qexp.report.html.heatmaps import layer_column, score_map, sqnr_map, unique_columns
from qexp.report.html.pictures import images_of, make_album
from qexp.report.html.steps import points_for, steps_of
from qexp.report.html.texts import make_texts, texts_of
from qexp.report.markdown import summary_line
from qexp.report.marks import busy_cores, differing_environments, footnotes, members_of
from qexp.report.table import numbers_text, status_text
from qexp.results.rows import Row

Document = dict[str, Any]
Sweep = tuple[Mapping[str, Any], list[Row]]
Part = TypeVar("Part")
MEMORY = "memory/weights_gib"
CHOICES = (  # x, y: those are offered whose metrics are there
    (MEMORY, "quality/psnr_db"), (MEMORY, "quality/kl_divergence"), (MEMORY, "quality/perplexity"),
    (MEMORY, "quality/lpips"), (MEMORY, "roundtrip/sqnr_db_mean"), (MEMORY, "quality/answer_accuracy"),
    (MEMORY, "quality/relative_l2"), (MEMORY, "time/step_ms"), ("time/step_ms", "quality/psnr_db"),
    ("time/step_ms", "quality/kl_divergence"), ("memory/run_peak_device_gib", "time/step_ms"),
)  # fmt: skip


def report_document(
    title: str, sweeps: Sequence[Sweep], rows: list[Row], prepared: list[Row], folder: Path
) -> Document:
    """Return the document of a page in `folder`.

    Args:
        sweeps: (manifest, its rows) of each.
        rows: of all of them, one for each run.
        prepared: these as rows of the table, see `prepare_compared`.
    """
    warnings: list[str] = []
    columns = table_columns(rows, prepared)
    places = [member_rows(row, rows) for row in prepared]
    row_of = {run: row for row, runs in enumerate(places) for run in runs}
    return {
        "title": title,
        "sweeps": [_heading(manifest, of_it) for manifest, of_it in sweeps],
        "columns": columns,
        "rows": _rows(prepared, places, folder),
        **_runs(rows, row_of),
        "families": _families(prepared),
        "sorted_by": next((name for name in (MEMORY, "#") if any(column["id"] == name for column in columns)), ""),
        "plot": _plot(columns),
        "footnotes": [*footnotes(prepared), *comparison_notes(prepared)],
        **_contents(rows, row_of, warnings),
        "warnings": warnings,
    }


def _heading(manifest: Mapping[str, Any], rows: list[Row]) -> Document:
    return {
        "name": str(manifest["name"]),
        "summary": summary_line(manifest, rows),
        "notes": str(manifest.get("notes") or ""),
        "command": shlex.join(manifest["command"]) if manifest.get("command") else "",
    }


def _rows(prepared: list[Row], places: Sequence[Sequence[int]], folder: Path) -> list[Document]:
    differing = differing_environments(prepared)
    return [
        {
            "number": numbers_text(row), "key": row["key"], "name": row["name"], "is_done": row["status"] == "done",
            "status": status_text(row), "message": str(row["message"] or ""), "family": family_of(row),
            "marker": offload_marker(str(row["offload"])), "is_busy": busy_cores(row) is not None,
            "other": next((differing[run["number"]] for run in members_of(row) if run["number"] in differing), ""),
            "runs": list(places[number]), "folder": settings.folder_link(row, folder),
        }
        for number, row in enumerate(prepared)
    ]  # fmt: skip


def _runs(rows: list[Row], row_of: Mapping[int, int]) -> Document:
    config, configs = settings.shared_settings([settings.config_texts(row) for row in rows])
    env, envs = settings.shared_settings([settings.env_texts(row) for row in rows])
    runs = [
        {
            "number": row["number"], "key": row["key"], "row": row_of.get(place),
            "seed": str((row["config"] or {}).get("seed", "")), "command": settings.repeating_command(row),
            "typed": settings.typed_command(row), "has_config": row["config"] is not None, "config": configs[place],
            "has_env": row["env"] is not None, "env": envs[place],
        }
        for place, row in enumerate(rows)
    ]  # fmt: skip
    return {"runs": runs, "base": {"config": config, "env": env}}


def _families(prepared: list[Row]) -> list[Document]:
    names = dict.fromkeys(family_of(row) for row in prepared if row["status"] == "done")
    return [{"name": name, **dict(zip(("light", "dark"), family_colors(name), strict=True))} for name in sorted(names)]


def _plot(columns: Sequence[Column]) -> Document:
    numbers = {column["id"]: column for column in columns if column["kind"] == "number"}
    choices = [
        {"label": f"{numbers[x]['label']} – {numbers[y]['label']}", "x": x, "y": y}
        for x, y in CHOICES
        if x in numbers and y in numbers and any(numbers[x]["values"]) and any(numbers[y]["values"])
    ]
    if choices:
        return {"x": choices[0]["x"], "y": choices[0]["y"], "choices": choices}
    names = [column["id"] for column in numbers.values() if column["shown"]] or list(numbers)
    return {"x": names[0], "y": names[-1], "choices": []} if names else {"x": "", "y": "", "choices": []}


def _contents(rows: list[Row], row_of: Mapping[int, int], warnings: list[str]) -> Document:
    """What the run folders hold; of a file that is damaged, a warning."""

    def each(read: Callable[[Row, int, int], Part | None]) -> Iterator[Part]:
        seen = set[Path]()
        for place, row in enumerate(rows):
            # a run that stands there twice is read once
            if place in row_of and row["status"] == "done" and row["folder"] not in (None, *seen):
                seen.add(row["folder"])
                try:
                    found = read(row, place, row_of[place])
                except DiskError as error:
                    warnings.append(f"{error} (this report is without it)")
                    continue
                if found is not None:
                    yield found

    points = points_for(sum(row["status"] == "done" for row in rows))
    layers = unique_columns(each(lambda row, place, table_row: (table_row, layer_column(row))))
    maps = [sqnr_map(layers), *each(lambda row, place, table_row: score_map(row, table_row))]
    return {
        "pictures": make_album(list(each(images_of))),
        "texts": make_texts(list(each(texts_of))),
        "steps": list(each(lambda row, place, table_row: steps_of(row, place, table_row, points))),
        "maps": [found for found in maps if found is not None],
    }
