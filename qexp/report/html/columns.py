"""The columns of the table in report.html: texts, settings that vary, and every metric that a row has.

A column is a dict:

    id        'backend', 'setting:components.transformer.backend.label' or the name of a metric
    label     its header, without the unit
    kind      'text' or 'number'
    group     of the list in which columns are chosen: 'experiment', 'settings' or the group of a metric
    shown     whether the table has it when the page opens
    values    one for each row: text, or a number in the column's unit; null where there is none

and of a number also

    unit, better ('higher', 'lower' or ''), digits (a Python format), meaning, axis (its name on a plot)
    n         what the values are of ('200 images', '19 steps', '3 seeds'): one text, or one for each row
    words     row -> what stands in place of a number: 'exact' (no error at all), 'not finite'
    spread    row -> standard deviation over seeds
    interval  row -> [low, high], 95 %
    versus    row -> how it compares with the baseline
    missing   row -> '(of 2)': how many of its seeds have the value
    best      rows with the best value of those that are quantized; none where values cannot be compared
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qexp.metrics.registry import Metric, find_metric, is_infinite, member_of, metric_order
from qexp.report.html.appearance import UNQUANTIZED
from qexp.report.marks import busy_cores, members_of
from qexp.report.results_csv import flatten_config, varying_settings
from qexp.report.table import STEP_MS, TEXTS, absent_text, missing_seeds_text, numbers_text, status_text, sweeps_text
from qexp.results.labels import backend_family
from qexp.results.numbers import shown_unit
from qexp.results.rows import Row

Column = dict[str, Any]
DIGITS = 9  # significant ones of a number in the page: more than any format shows


def table_columns(rows: list[Row], prepared: list[Row]) -> list[Column]:
    """Return every column that has a value in some row. rows: single runs; prepared: rows of the table."""
    columns = [*_text_columns(prepared), *_setting_columns(rows, prepared)]
    names = sorted({name for row in prepared for name in row["metrics"]}, key=metric_order)
    columns += [_metric_column(name, prepared) for name in names]
    return [one for one in columns if one.get("words") or any(value not in (None, "") for value in one["values"])]


def _text_columns(prepared: list[Row]) -> list[Column]:
    texts = {
        "#": [numbers_text(row) for row in prepared],
        "status": [status_text(row) for row in prepared],
        "sweep": [sweeps_text(row) for row in prepared],
    }
    columns = {name: texts.get(name) or [str(row.get(name, "")) for row in prepared] for name in TEXTS}
    plain = {"#": set(columns["#"]), "status": {"done"}, "offload": {"none", ""}}  # that tell nothing
    return [
        {"id": name, "label": name, "kind": "text", "group": "experiment", "values": values}
        | {"shown": not {*values} <= plain.get(name, set())}
        for name, values in columns.items()
    ]


def _setting_columns(rows: list[Row], prepared: list[Row]) -> list[Column]:
    """The settings that differ between runs, in full; the table has their short form in `setting`."""
    configs = [[dict(flatten_config(run.get("config") or {})) for run in members_of(row)] for row in prepared]
    return [
        {"id": f"setting:{name}", "label": name, "kind": "text", "group": "settings", "shown": False}
        | {"values": [", ".join(_setting_texts(name, members)) for members in configs]}
        for name in varying_settings(rows)
    ]


def _setting_texts(name: str, configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The values of a setting in the runs of a row, each once: several seeds."""
    return list(dict.fromkeys(str(config[name]) for config in configs if config.get(name) is not None))


def _metric_column(name: str, prepared: list[Row]) -> Column:
    metric = member_of(find_metric(name) or Metric(name, "", digits=".4g"), name)
    unit, factor = shown_unit(metric, (row["metrics"].get(name) for row in prepared))
    values = [
        None if metric.hidden_by in row["metrics"] else _scaled(row["metrics"].get(name), factor) for row in prepared
    ]
    return {
        "id": name, "label": _label_of(name, metric, unit), "kind": "number", "group": metric.group,
        "shown": _is_shown(metric, values), "unit": unit, "better": metric.better, "digits": metric.digits,
        "meaning": metric.meaning, "axis": metric.axis.format(unit=unit), "is_time": metric.group == "time",
        "values": values,
        "n": _united_n([_n_of(row, name, metric) for row in prepared]),
        "words": _sparse(prepared, lambda row: absent_text(row, metric)),
        "spread": _sparse(prepared, lambda row: _scaled(row.get("spread", {}).get(name), factor)),
        "interval": _sparse(prepared, lambda row: _ends(row.get("intervals", {}).get(name), factor)),
        "versus": _sparse(prepared, lambda row: row.get("versus", {}).get(name)),
        "missing": _sparse(prepared, lambda row: missing_seeds_text(row, name)),
        "best": _best_rows(prepared, metric, values),
    }  # fmt: skip


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else float(f"{value * factor:.{DIGITS}g}")


def _ends(interval: Sequence[float] | None, factor: float) -> list[float | None] | None:
    return None if interval is None else [_scaled(end, factor) for end in interval]


def _sparse(prepared: list[Row], value_of: Any) -> dict[str, Any]:
    """Row -> value, where there is one; keys are texts, as in JSON."""
    found = ((str(number), value_of(row)) for number, row in enumerate(prepared))
    return {number: value for number, value in found if value not in (None, "")}


def _label_of(name: str, metric: Metric, unit: str) -> str:
    """'PSNR' of 'PSNR dB'; 'load peak anon' of load/peak_anon_gib, which has no header."""
    if metric.header:
        text = metric.header.replace("{unit}", "").strip()
        return text.removesuffix(f" {unit}") if unit else text
    group, _, short = name.partition("/")
    words = short.removesuffix(f"_{metric.unit.lower()}") if metric.unit else short
    return f"{group} {words}".replace("_", " ")


def _is_shown(metric: Metric, values: Sequence[float | None]) -> bool:
    """Metrics with a header, but for the less important ones and the memory of a device that is not there."""
    is_absent = metric.name == "memory/run_peak_device_gib" and not any(values)
    return bool(metric.header) and not metric.is_minor and not is_absent


def _n_of(row: Row, name: str, metric: Metric) -> str:
    """What a value is of, in words: its samples, and the seeds that it is a mean over."""
    if row["metrics"].get(name) is None:
        return ""
    seeds = f"{row['seeds']} seeds" if "seeds" in row else ""
    kind, count_name = (metric.mean_over or metric.set_of).removeprefix("differing_"), metric.count_name
    if name == STEP_MS:
        kind, count_name = "steps", "time/measured_steps"
    count = row["metrics"].get(count_name) if count_name else None
    samples = "" if count is None else f"{count:g} {kind.replace('_', ' ')}"
    return " × ".join(filter(None, (samples, seeds))) or "1 run"


def _united_n(texts: list[str]) -> str | list[str]:
    present = {text for text in texts if text}
    return present.pop() if len(present) == 1 else texts


def _best_rows(prepared: list[Row], metric: Metric, values: Sequence[float | None]) -> list[int]:
    """The unquantized model is best by definition, and does not count; times of a busy machine are of that moment."""
    quantized = [number for number, row in enumerate(prepared) if backend_family(row["backend"]) != UNQUANTIZED]
    counts = {prepared[number]["metrics"].get(metric.count_name) for number in quantized} if metric.set_of else set()
    is_disturbed = metric.group == "time" and any(busy_cores(row) is not None for row in prepared)
    if not metric.better or len(quantized) < 2 or len(counts - {None}) > 1 or is_disturbed:
        return []
    sign = 1 if metric.better == "higher" else -1
    known = {number: _rank(values[number], prepared[number]["metrics"], metric, sign) for number in quantized}
    ranks = {number: rank for number, rank in known.items() if rank is not None}
    best = max(ranks.values(), default=None)
    found = [number for number, rank in ranks.items() if rank == best]
    return found if 2 * len(found) <= len(ranks) else []  # where most are equal, none stands out


def _rank(value: float | None, metrics: Mapping[str, float | None], metric: Metric, sign: int) -> float | None:
    if value is None:
        return float("inf") if is_infinite(metrics, metric) else None
    return sign * value


def family_of(row: Row) -> str:
    """Return the libraries that quantized a row's model; '' for an experiment that does not resolve."""
    return backend_family(row["backend"]) if row["config"] else ""


def member_rows(row: Row, rows: Sequence[Row]) -> list[int]:
    """Return the places in `rows` of the runs that a row of the table unites."""
    wanted = {(member["number"], member["key"]) for member in members_of(row)}
    return [place for place, run in enumerate(rows) if (run["number"], run["key"]) in wanted]
