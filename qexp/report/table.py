"""The table of a sweep for the terminal: sorted by memory, failures with their reasons below it.

Columns without a value anywhere are left out, and some that matter less where there is no room; text columns are
shortened in their middle until a line fits 120 characters.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from math import inf
from typing import Literal

from qexp.metrics.registry import Metric, is_infinite, metrics_in
from qexp.report.marks import BUSY, OTHER, busy_cores, differing_environments, footnotes, members_of
from qexp.report.seeds import with_seeds_united
from qexp.results.labels import SEPARATOR, experiment_name, settings_labels
from qexp.results.numbers import format_number, shown_unit
from qexp.results.rows import Row, rows_of_sweep

__all__ = ["format_table", "prepare", "rows_of_sweep", "status_text", "table_cells"]

WIDTH = 120
STEP_MS = "time/step_ms"
NARROWEST = 12  # a text column is not shortened below this
PARTS = ("model", "backend", "offload", "task")  # of a label
TEXTS = ("#", "sweep", "model", "task", "backend", "offload", "setting", "status", "seeds")


@dataclass(frozen=True)
class Column:
    """A column of numbers: its metric, in the one unit that suits all of its values.

    part: what is shown of it: the value, its interval, or how it compares with the baseline (`comparison.py`).
    """

    metric: Metric
    header: str  # its last word goes into a second line
    factor: float
    unit: str = ""
    part: Literal["value", "interval", "versus"] = "value"


def number_columns(prepared: list[Row]) -> dict[str, Column]:
    """Return the columns of the metrics that have one, by their headers."""
    columns = []
    for metric in metrics_in(name for row in prepared for name in row["metrics"]):
        if metric.header:
            unit, factor = shown_unit(metric, (row["metrics"].get(metric.name) for row in prepared))
            column = Column(metric, metric.header.format(unit=unit), factor, unit)
            columns.append(column)
            if any(metric.name in row.get("intervals", {}) for row in prepared):
                columns.append(replace(column, header=f"{column.header} 95%", part="interval"))
            if any(metric.name in row.get("versus", {}) for row in prepared):
                columns.append(replace(column, header=f"{column.header} vs", part="versus"))
    return {column.header: column for column in columns}


def format_table(rows: Iterable[Row]) -> str:
    """Return rows (of `rows_of_sweep`) as aligned text."""
    prepared = prepare(rows)
    if not prepared:
        return "no experiments"
    table = table_cells(prepared)
    header = columns_that_fit(table, number_columns(prepared))
    lines = [[_heads(name)[part] for name in header] for part in (0, 1)]
    lines += [[line[name] for name in header] for line in table]
    widths = _fit([max(map(len, column)) for column in zip(*lines, strict=True)], header)
    text = [_table_line(line, widths, header) for line in lines]
    text.insert(2, _table_line(["─" * width for width in widths], widths, header))
    notes = [line for note in footnotes(prepared) for line in textwrap.wrap(note, WIDTH, subsequent_indent="  ")]
    cut = _cut_settings(table, dict(zip(header, widths, strict=True)))
    return "\n".join([*text, *([""] if notes else []), *notes, *cut, *_failure_lines(prepared)])


def _heads(name: str) -> tuple[str, str]:
    """Return the two lines of a header: its last word stands in the second one."""
    first, _, last = name.rpartition(" ")
    return first, last


def prepare(rows: Iterable[Row]) -> list[Row]:
    """Return rows as dicts with the parts of their label and what tells them apart, the smallest weights first.

    Experiments that differ in their seed alone are one row (`seeds.py`). Those without a result come last, in the order
    they ran.
    """
    plain = with_seeds_united([dict(row) for row in rows])
    settings = settings_labels([row["overrides"] for row in plain], [str(row["label"]) for row in plain])
    for row, setting in zip(plain, settings, strict=True):
        parts = str(row["label"]).split(SEPARATOR)
        is_label = len(parts) == len(PARTS)  # else overrides, of an experiment that does not resolve
        named = dict(zip(PARTS, parts, strict=True)) if is_label else {"backend": row["label"]}
        name = experiment_name(row["label"], setting if is_label else "")
        row.update({part: named.get(part, "") for part in PARTS}, setting=setting, name=name)
    for name in ("model", "task"):
        if len({row[name] for row in plain if row[name]}) < 2:
            plain = [row | {name: ""} for row in plain]  # the same everywhere: not worth a column
    return sorted(plain, key=lambda row: (row["metrics"].get("memory/weights_gib") or inf, row["number"]))


def table_cells(prepared: list[Row]) -> list[dict[str, str]]:
    """Return the text of every column that has a value in some row, for each row; '' where it has none.

    Memory of a device that is not there is 0 everywhere, and no value.
    """
    columns = number_columns(prepared)
    differing = differing_environments(prepared)
    lines = [
        _texts(row, differing) | {name: format_value(row, column) for name, column in columns.items()}
        for row in prepared
    ]
    shown = [
        name
        for name in (*TEXTS, *columns)
        if any(line[name] for line in lines) and not _is_absent_device(columns.get(name), prepared)
    ]
    return [{name: line[name] for name in shown} for line in lines]


def _texts(row: Row, differing: Mapping[int, str]) -> dict[str, str]:
    mark = f" {OTHER}" if any(member["number"] in differing for member in members_of(row)) else ""
    texts = {
        "#": numbers_text(row),
        "sweep": sweeps_text(row),
        "status": status_text(row) + mark,
        "seeds": str(row.get("seeds", "")),
    }
    return texts | {name: str(row[name]) for name in ("model", "task", "backend", "offload", "setting")}


def numbers_text(row: Row) -> str:
    """Return the numbers of the experiments in a row: '1-3, 5'."""
    numbers = enumerate(sorted(member["number"] for member in members_of(row)))
    # a run of neighbours has the same distance from its places all along
    runs = [[number for _, number in run] for _, run in groupby(numbers, lambda pair: pair[1] - pair[0])]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def sweeps_text(row: Row) -> str:
    """Return the sweeps of the runs in a row, where a report has several."""
    return ", ".join(dict.fromkeys(run["sweep"] for run in members_of(row) if run.get("sweep")))


def _is_absent_device(column: Column | None, prepared: list[Row]) -> bool:
    name = "memory/run_peak_device_gib"
    return column is not None and column.metric.name == name and not any(row["metrics"].get(name) for row in prepared)


def status_text(row: Row) -> str:
    """'done', 'reused' for a result of an earlier run, or the status with its reason: 'failed: oom'."""
    if row["status"] == "done":
        return "reused" if row["reused"] else "done"
    reason = row["reason"]
    return f"{row['status']}: {reason}" if reason and reason != row["status"] else str(row["status"])


def format_value(row: Row, column: Column) -> str:
    """Return the text of a cell, '' where there is nothing to show.

    A value is in the unit of its column: of several seeds with ± its standard deviation, with its n where that changes
    it; in words for a ratio that is infinite since there is no error, and for outputs that are not finite.
    """
    metrics, metric = row["metrics"], column.metric
    if column.part == "versus":
        return str(row.get("versus", {}).get(metric.name, ""))
    if column.part == "interval":
        ends = row.get("intervals", {}).get(metric.name, ())
        text = ", ".join(format_number(end * column.factor, metric.digits) for end in ends)
        return f"[{text}]" if text else ""
    value = metrics.get(metric.name)
    if value is None or metric.hidden_by in metrics:
        return absent_text(row, metric)
    text = format_number(value * column.factor, metric.digits)
    if (spread := row.get("spread", {}).get(metric.name)) is not None:
        text += f" ±{format_number(spread * column.factor, metric.digits)}"
    elif metric.name == STEP_MS:
        text += _range_of_steps(metrics, metric.digits)
    text = f"{text} {missing_seeds_text(row, metric.name)}".rstrip()
    count = metrics.get(metric.count_name) if metric.set_of and metric.count_name else None
    text = text if count is None else f"{text} n={count:g}"
    return f"{text} {BUSY}" if metric.group == "time" and busy_cores(row) is not None else text


def absent_text(row: Row, metric: Metric) -> str:
    """Return 'exact' or 'not finite' for a value that is null because of that, else ''."""
    metrics = row["metrics"]
    if metrics.get(metric.name) is not None or metric.name not in metrics or metric.hidden_by in metrics:
        return ""
    if metric.group == "quality" and metrics.get("quality/finite", 1) != 1:
        return "not finite"
    return "exact" if is_infinite(metrics, metric) else ""


def missing_seeds_text(row: Row, name: str) -> str:
    """Return '(of 2)' where only two of the row's seeds have the metric, else ''."""
    have = row.get("counts", {}).get(name)
    return f"(of {have})" if have is not None and have < row["seeds"] else ""


def _range_of_steps(metrics: Mapping[str, float | None], digits: str) -> str:
    """' (11.5-14.2)': the fastest and the slowest step; '' where they are not known, or the same."""
    least, most = (metrics.get(f"{STEP_MS}_{end}") for end in ("min", "max"))
    texts = [format_number(value, digits) for value in (least, most) if value is not None]
    return f" ({'-'.join(texts)})" if len(set(texts)) == 2 else ""


def columns_that_fit(table: list[dict[str, str]], columns: Mapping[str, Column]) -> list[str]:
    """Return the columns of a table; less important ones are left out until no other has to be shortened."""
    names = list(table[0])
    intervals = [name for name in reversed(names) if name in columns and columns[name].part == "interval"]
    minor = [name for name in reversed(names) if name in columns and columns[name].metric.is_minor]
    for extra in dict.fromkeys((*minor, *intervals)):
        widths = [max(len(text) for text in (*_heads(name), *(line[name] for line in table))) for name in names]
        if _excess(widths) > 0:
            names.remove(extra)
    return names


def _excess(widths: list[int]) -> int:
    return sum(widths) + 2 * (len(widths) - 1) - WIDTH


def _fit(widths: list[int], header: list[str]) -> list[int]:
    """Take from the text columns until a line fits, from the settings first and from the backend last."""
    for name in ("setting", "sweep", "model", "task", "status", "offload", "backend"):
        excess = _excess(widths)
        if name in header and excess > 0:
            place = header.index(name)
            widths[place] = max(min(widths[place], NARROWEST), widths[place] - excess)
    return widths


def _table_line(words: list[str], widths: list[int], header: list[str]) -> str:
    align: list[Callable[[str, int], str]] = [str.ljust if name in TEXTS[1:] else str.rjust for name in header]
    parts = zip(align, words, widths, strict=True)
    return "  ".join(put(_shorten(word, width), width) for put, word, width in parts).rstrip()


def _shorten(word: str, width: int) -> str:
    head = width // 2
    return word if len(word) <= width else f"{word[:head]}…{word[len(word) - (width - head - 1) :]}"


def _cut_settings(table: list[dict[str, str]], widths: Mapping[str, int]) -> list[str]:
    """Return a line for each row whose settings the table has to shorten: with all of them."""
    cut = [line for line in table if len(line.get("setting", "")) > widths.get("setting", WIDTH)]
    return ["", *(f"#{line['#']}: {line['setting']}" for line in cut)] if cut else []


def _failure_lines(prepared: list[Row]) -> list[str]:
    """Return a paragraph for each experiment without a result: its name, and what it says."""
    lines = []
    for row in sorted(prepared, key=lambda row: row["number"]):
        if row["status"] != "done":
            head = f"#{row['number']} {row['name']}: {status_text(row)}"
            text = f"{head}: {' '.join(str(row['message']).split())}" if row["message"] else head
            lines += textwrap.wrap(text, WIDTH, subsequent_indent="   ", break_on_hyphens=False)
    return ["", *lines] if lines else []
