"""The table of a sweep for the terminal: sorted by memory, failures with their reasons below it.

Columns without a value anywhere are left out, and some that matter less where there is no room; text columns are
shortened in their middle until a line fits 120 characters.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from qexp.results.labels import SEPARATOR, settings_labels
from qexp.results.rows import Row, rows_of_sweep

__all__ = ["COLUMNS", "cells", "format_table", "format_value", "prepare", "rows_of_sweep", "shown_columns"]

WIDTH = 120
NARROWEST = 12  # a text column is not shortened below this
PARTS = ("model", "backend", "offload", "task")  # of a label
MIB = 1024.0
# header (its last word goes into a second line) -> (metric, factor, format)
NUMBERS: dict[str, tuple[str, float, str]] = {
    "weights MiB": ("memory/weights_gib", MIB, ".2f"),
    "bits/ weight": ("memory/bits_per_weight", 1, ".2f"),
    "load MiB": ("load/peak_host_gib", MIB, ".1f"),
    "run MiB": ("memory/run_peak_host_gib", MIB, ".1f"),
    "device MiB": ("memory/run_peak_device_gib", MIB, ".1f"),
    "step ms": ("time/step_ms", 1, ".1f"),
    "PSNR dB": ("quality/psnr_db", 1, ".2f"),
    "SSIM": ("quality/ssim", 1, ".4f"),
    "class acc.": ("quality/class_accuracy", 1, ".3f"),
    "Fréchet distance": ("quality/frechet_distance", 1, ".2f"),
    "relative L2": ("quality/relative_l2", 1, ".2e"),
    "LPIPS": ("quality/lpips", 1, ".4f"),
    "CLIP score": ("quality/clip_score", 1, ".2f"),
    "FID": ("quality/fid", 1, ".2f"),
    "exact match": ("quality/exact_match", 1, ".3f"),
    "answer acc.": ("quality/answer_accuracy", 1, ".3f"),
    "perplexity": ("quality/perplexity", 1, ".4f"),
    "KL div.": ("quality/kl_divergence", 1, ".2e"),
    "top-1 agreement": ("quality/top1_agreement", 1, ".4f"),
    "SQNR dB": ("roundtrip/sqnr_db_mean", 1, ".2f"),
    "SQNR min": ("roundtrip/sqnr_db_min", 1, ".2f"),
    "max error": ("roundtrip/max_abs_error", 1, ".2e"),
}
WITHOUT = {"relative L2": "quality/psnr_db"}  # column -> the metric that says it better, where there is one
IF_THERE_IS_ROOM = ("Fréchet distance",)
# a ratio that is null -> the metric that is equal to a second one, or to a number, if the ratio is infinite
INFINITE_IF: dict[str, tuple[str, str | int]] = {
    "quality/psnr_db": ("quality/exact", 1),
    "roundtrip/sqnr_db_mean": ("roundtrip/exact_layers", "roundtrip/layers"),
    "roundtrip/sqnr_db_min": ("roundtrip/exact_layers", "roundtrip/layers"),
}
TEXTS = ("#", "model", "task", "backend", "offload", "setting", "status")
COLUMNS = (*TEXTS, *NUMBERS)


def format_table(rows: Iterable[Any]) -> str:
    """Rows (of `rows_of_sweep`, or job rows with number, label, overrides, status, metrics ...) as aligned text."""
    prepared = prepare(rows)
    if not prepared:
        return "no experiments"
    header = _without_extras(prepared)
    heads = [[name.rpartition(" ")[part] for name in header] for part in (0, 2)]
    lines = [[cells(row)[name] for name in header] for row in prepared]
    widths = _fit(_widths(prepared, header), header)
    rule = ["─" * width for width in widths]
    text = [_line(line, widths, header) for line in (*heads, rule, *lines)]
    return "\n".join([*text, *_failures(prepared)])


def prepare(rows: Iterable[Any]) -> list[Row]:
    """Rows as dicts with the parts of their label and what tells them apart, the smallest weights first.

    Experiments without a result come last, in the order they ran.
    """
    plain = [_as_dict(row) for row in rows]
    for row, setting in zip(plain, settings_labels([row["overrides"] for row in plain]), strict=True):
        parts = str(row["label"]).split(SEPARATOR)
        named = dict(zip(PARTS, parts, strict=True)) if len(parts) == len(PARTS) else {"backend": row["label"]}
        row.update({name: named.get(name, "") for name in PARTS}, setting=setting)
    for name in ("model", "task"):
        if len({row[name] for row in plain if row[name]}) < 2:
            plain = [row | {name: ""} for row in plain]  # the same everywhere: not worth a column
    infinity = float("inf")
    return sorted(plain, key=lambda row: (row["metrics"].get("memory/weights_gib") or infinity, row["number"]))


def _as_dict(row: Any) -> Row:
    if isinstance(row, Mapping):
        return dict(row)
    if is_dataclass(row):
        return {item.name: getattr(row, item.name) for item in fields(row)}
    raise TypeError(f"a row is a mapping or a dataclass, not {type(row).__name__}")


def cells(row: Row) -> dict[str, str]:
    """The text of every column for a prepared row; '' where there is no value."""
    texts = {"#": str(row["number"]), "status": status_text(row)}
    texts |= {name: str(row[name]) for name in ("model", "task", "backend", "offload", "setting")}
    said = {name for name, better in WITHOUT.items() if better in row["metrics"]}
    return texts | {name: "" if name in said else format_value(row["metrics"], name) for name in NUMBERS}


def status_text(row: Row) -> str:
    """'done', 'reused' for a result of an earlier run, or the status with its reason: 'failed: oom'."""
    if row["status"] == "done":
        return "reused" if row["reused"] else "done"
    reason = row["reason"]
    return f"{row['status']}: {reason}" if reason and reason != row["status"] else str(row["status"])


def format_value(metrics: Mapping[str, float | None], column: str) -> str:
    """A metric in the unit of its column; in words for a ratio that is infinite since there is no error, and for a
    comparison of outputs that are not finite."""
    metric, factor, style = NUMBERS[column]
    value = metrics.get(metric)
    if value is not None:
        return format(value * factor, style)
    if metric in metrics and metric.startswith("quality/") and metrics.get("quality/finite") == 0:
        return "not finite"
    return "exact" if is_exact(metrics, metric) else ""


def is_exact(metrics: Mapping[str, float | None], metric: str) -> bool:
    """Whether a signal-to-noise ratio is null because it is infinite: nothing differs from the original."""
    if metric not in INFINITE_IF:
        return False
    sign, expected = INFINITE_IF[metric]
    value = metrics.get(expected) if isinstance(expected, str) else expected
    return metric in metrics and metrics[metric] is None and value not in (None, 0) and metrics.get(sign) == value


def shown_columns(prepared: list[Row]) -> list[str]:
    """Columns that have a value in some row; memory of a device that is not there is 0 everywhere, and no value."""
    columns = {name: {cells(row)[name] for row in prepared} for name in COLUMNS}
    columns["device MiB"] -= {"0.0"}
    return [name for name in COLUMNS if any(columns[name])]


def _widths(prepared: list[Row], header: list[str]) -> list[int]:
    """What each column needs; a header takes two lines."""
    texts = [
        [name.rpartition(" ")[0], name.rpartition(" ")[2], *(cells(row)[name] for row in prepared)] for name in header
    ]
    return [max(map(len, column)) for column in texts]


def _without_extras(prepared: list[Row]) -> list[str]:
    """The columns, the less important ones only if no other has to be shortened for them."""
    header = shown_columns(prepared)
    if _excess(_widths(prepared, header)) <= 0:
        return header
    return [name for name in header if name not in IF_THERE_IS_ROOM]


def _excess(widths: list[int]) -> int:
    return sum(widths) + 2 * (len(widths) - 1) - WIDTH


def _fit(widths: list[int], header: list[str]) -> list[int]:
    """Take from the text columns until a line fits, from the settings first and from the backend last."""
    for name in ("setting", "model", "task", "status", "offload", "backend"):
        excess = _excess(widths)
        if name in header and excess > 0:
            place = header.index(name)
            widths[place] = max(min(widths[place], NARROWEST), widths[place] - excess)
    return widths


def _line(words: list[str], widths: list[int], header: list[str]) -> str:
    align: list[Callable[[str, int], str]] = [str.ljust if name in TEXTS[1:] else str.rjust for name in header]
    parts = zip(align, words, widths, strict=True)
    return "  ".join(put(_shorten(word, width), width) for put, word, width in parts).rstrip()


def _shorten(word: str, width: int) -> str:
    head = width // 2
    return word if len(word) <= width else f"{word[:head]}…{word[len(word) - (width - head - 1) :]}"


def _failures(prepared: list[Row]) -> list[str]:
    """A paragraph for each experiment without a result: its name, and what it says."""
    lines = []
    for row in sorted(prepared, key=lambda row: row["number"]):
        if row["status"] != "done":
            head = f"#{row['number']} {row['label']}: {status_text(row)}"
            text = f"{head}: {' '.join(str(row['message']).split())}" if row["message"] else head
            lines += textwrap.wrap(text, WIDTH, subsequent_indent="   ", break_on_hyphens=False)
    return ["", *lines] if lines else []
