"""report.md of sweeps and runs: what was compared, table, plots, what failed and why, where it ran, how to repeat it.

Links are relative to the report's folder, so that an outputs folder can be moved or published as it is.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from qexp.report.comparison import comparison_notes
from qexp.report.marks import OTHER, differing_environments, footnotes, members_of, versions_of_runs
from qexp.report.selection import Selection, SweepRows
from qexp.report.table import TEXTS, status_text, table_cells
from qexp.results.manifest import count_line
from qexp.results.rows import Row

MACHINE = ("host", "cpu", "cores", "memory_gib", "device", "device_name", "threads", "platform", "python")


def report_markdown(selection: Selection, prepared: list[Row], folder: Path, plots: list[str]) -> str:
    """Return the text of report.md in `folder`.

    Args:
        prepared: the selection's rows as rows of the table, see `prepare_compared`.
        plots: file names beside it.
    """
    done = [row for row in prepared if row["status"] == "done"]
    failures = sorted((row for row in prepared if row["status"] != "done"), key=lambda row: row["number"])
    parts = [f"# {report_heading(selection)}", report_intro(selection)]
    parts += ["## Results", _results(done, folder), *comparison_notes(prepared)] if done else []
    parts += [f"![memory against quality]({plot})" for plot in plots]
    parts += ["## Without a result", _failures_table(failures, folder)] if failures else []
    parts += ["## Machine and versions", *_environments(selection.rows)] if done else []
    return "\n\n".join([*parts, "All numbers, and every setting that varies: [results.csv](results.csv)."]) + "\n"


def report_heading(selection: Selection) -> str:
    """Return 'Sweep first', 'Sweeps first + second' or '3 runs'."""
    named = [sweep.name for sweep in selection.sweeps if sweep.folder]
    kind = "Sweep " if len(named) == 1 else "Sweeps "
    return f"{kind if named else ''}{selection.title}"


def report_intro(selection: Selection) -> str:
    """Return the introduction: experiments, purpose and outcomes of each sweep, and the command that runs it again."""
    if len(selection.sweeps) == 1:
        return _intro(selection.sweeps[0])
    return "\n\n".join(f"**{_escape_cell(sweep.name)}**: {_intro(sweep)}" for sweep in selection.sweeps)


def _intro(sweep: SweepRows) -> str:
    if sweep.folder is None:
        again = "To run one again: `python -m qexp.rerun <its folder>`."
        return "\n\n".join([summary_line(sweep.manifest, sweep.rows), again])
    manifest = sweep.manifest
    notes = [_escape_cell(manifest["notes"])] if manifest.get("notes") else []
    command = [f"To run it again:\n\n```\n{shlex.join(manifest['command'])}\n```"] if manifest["command"] else []
    return "\n\n".join([summary_line(manifest, sweep.rows), *notes, *command])


def summary_line(manifest: Mapping[str, Any], rows: list[Row]) -> str:
    """'12 experiments, started 2026-01-02 03:04: 9 done (2 reused), 2 failed, 1 not run, or cut off.'"""
    number, _, counts = count_line(rows, manifest.get("total")).partition(": ")
    models = ", ".join(dict.fromkeys(str(row["config"]["model"]["source"]) for row in rows if row["config"]))
    subject = f" with the model {models}" if models else ""
    start = manifest["started"] and datetime.fromisoformat(manifest["started"]).strftime(", started %Y-%m-%d %H:%M")
    unfinished = "" if manifest.get("finished") else " The sweep has not finished."
    return f"{number}{subject}{start or ''}: {counts}.{unfinished}"


def _results(done: list[Row], folder: Path) -> str:
    """Return the smallest weights first, quality and time beside them."""
    table = [{name: text for name, text in line.items() if name not in ("#", "status")} for line in table_cells(done)]
    differing = differing_environments(done)
    links = [", ".join(dict.fromkeys(_folder_link(run, folder, differing) for run in members_of(row))) for row in done]
    lines = [[*line.values(), link] for line, link in zip(table, links, strict=True)]
    header = list(table[0])
    aligned = [":--" if name in TEXTS else "--:" for name in header]
    text = _table([*(name.replace("/ ", "/") for name in header), "run"], [*aligned, ":--"], lines)
    return "\n\n".join([text, *(_escape_cell(note).replace("*", "\\*") for note in footnotes(done))])


def _failures_table(failures: list[Row], folder: Path) -> str:
    names = [": ".join(filter(None, (row.get("sweep"), row["name"]))) for row in failures]
    lines = [
        [name, status_text(row), row["message"], _folder_link(row, folder)]
        for name, row in zip(names, failures, strict=True)
    ]
    return _table(["experiment", "status", "reason", "run"], [":--"] * 4, lines)


def _table(header: list[str], aligned: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(map(_escape_cell, line)) + " |" for line in [header, aligned, *lines])


def _escape_cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


def _folder_link(row: Row, folder: Path, differing: Mapping[int, str] = MappingProxyType({})) -> str:
    if row["folder"] is None:
        return ""
    target = os.path.relpath(row["folder"], folder).replace(os.sep, "/").replace(" ", "%20")
    number = f" #{row['number']} {OTHER}" if row["number"] in differing else ""
    return f"[{row['key']}]({target}){number}"


def _environments(rows: list[Row]) -> list[str]:
    """Return one list per machine.

    Versions and commits are united: each experiment names only the libraries it uses.
    """
    machines: dict[tuple[str, ...], list[Row]] = {}
    for row in (row for row in rows if row["status"] == "done"):
        machines.setdefault(tuple(str(row["env"].get(name)) for name in MACHINE), []).append(row)
    texts = [_environment_table([row["env"] for row in found]) for found in machines.values()]
    if len(texts) == 1:
        return texts
    warning = f"Measured on {len(texts)} different machines: times and peaks of memory cannot be compared between them."
    named = [f"Experiments {_numbers(found)}:\n\n{text}" for found, text in zip(machines.values(), texts, strict=True)]
    return [warning, *named]


def _environment_table(environments: list[Mapping[str, Any]]) -> str:
    first = environments[0]
    versions = versions_of_runs(environments)
    lines = {
        "device": f"{first['device']} ({first['device_name']})",
        "host": f"{first['host']}: {first['cpu']}, {first['cores']} cores, {first['memory_gib']} GiB",
        "threads": first["threads"],
        "system": f"{first['platform']}, Python {first['python']}",
        "versions": ", ".join(f"{package} {' and '.join(found)}" for package, found in versions.items()),
        "commit": _commits(environment["commit"] for environment in environments),
    }
    return "\n".join(f"- {name}: {value}" for name, value in lines.items())


def _commits(values: Iterable[str | None]) -> str:
    """Return each once, shortened; a + at the end says that files differed from it."""
    found = dict.fromkeys(
        f"{value[:12]}{'+' * value.endswith('+')}" if value else "none (installed)" for value in values
    )
    return ", ".join(found) + (" (+: with changes)" if any(commit.endswith("+") for commit in found) else "")


def _numbers(rows: list[Row]) -> str:
    return ", ".join(str(number) for number in sorted(row["number"] for row in rows))
