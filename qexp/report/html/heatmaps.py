"""What each layer lost: its SQNR in every run of task=roundtrip, and the scores of task=sensitivity by format."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from qexp.report.html.tables import number_of, read_table
from qexp.results.rows import Row
from qexp.system.files import read_json

LAYERS, SCORES, SCORES_MEANING = "layers.csv", "sensitivity.csv", "sensitivity.json"
MOST_CELLS = 30_000  # of a map: some 200 KB
DENSE = "none"  # the format of a group that is not quantized: its score is 0

EXACT = "exact"
Layers = dict[str, float | str | None]  # name of a layer -> its value


def layer_column(row: Row) -> Layers:
    """Return layer -> SQNR in dB of a roundtrip, 'exact' without an error; {} for other runs.

    Raises: DamagedFileError, DiskError.
    """
    path = row["folder"] / LAYERS
    lines = read_table(path, ("layer", "sqnr_db"))
    components = {line.get("component") for line in lines}
    return {_layer_name(line.get("component"), line["layer"], len(components)): _sqnr(line, path) for line in lines}


def _layer_name(component: str | None, layer: str, components: int) -> str:
    return f"{component}: {layer}" if component and components > 1 else layer


def _sqnr(line: dict[str, str], path: Path) -> float | str | None:
    """A layer without an error has no SQNR, and an error of 0."""
    value = number_of(line["sqnr_db"], path, 4)
    is_exact = value is None and line.get("max_abs_error") and number_of(line["max_abs_error"], path) == 0
    return EXACT if is_exact else value


def sqnr_map(columns: Sequence[tuple[int, Layers]]) -> dict[str, Any] | None:
    """Return the map of layers against rows of the table; None without any. columns: (row of the table, its layers).

    title, unit, better, is_log; rows: names of layers; columns: {row, label}; values: one list for each layer; note.
    """
    shown = [(row, layers) for row, layers in columns if layers]
    if not shown:
        return None
    names = list(dict.fromkeys(name for _, layers in shown for name in layers))
    fitting = max(MOST_CELLS // len(names), 1)
    note = f"{fitting} of {len(shown)} runs are in this map" if len(shown) > fitting else ""
    shown = shown[:fitting]
    return {
        "title": "SQNR of each layer's weight", "unit": "dB", "better": "higher", "is_log": False, "rows": names,
        "columns": [{"row": row, "label": None} for row, _ in shown],
        "values": [[layers.get(name) for _, layers in shown] for name in names], "note": note,
    }  # fmt: skip


def score_map(row: Row, table_row: int) -> dict[str, Any] | None:
    """Return the map of groups of layers against formats of a run of task=sensitivity; None for other runs.

    Raises: DamagedFileError, DiskError.
    """
    path = row["folder"] / SCORES
    lines = read_table(path, ("component", "group", "format", "score"))
    if not lines:
        return None
    meaning = read_json(row["folder"] / SCORES_MEANING) or {}
    components = len({line["component"] for line in lines})
    values = {
        (_layer_name(line["component"], line["group"], components), line["format"]): number_of(line["score"], path, 4)
        for line in lines
        if line["format"] != DENSE
    }
    names, formats = (list(dict.fromkeys(key[part] for key in values)) for part in (0, 1))
    kept = names[: max(MOST_CELLS // max(len(formats), 1), 1)]
    note = f"{len(kept)} of {len(names)} groups are in this map" if len(kept) < len(names) else ""
    return {
        "title": f"What each format costs in each group of layers: {row['label']}", "unit": meaning.get("unit") or "",
        "better": "lower", "is_log": True, "rows": kept,
        "columns": [{"row": table_row, "label": name} for name in formats],
        "values": [[values.get((name, form)) for form in formats] for name in kept], "note": note,
    }  # fmt: skip


def unique_columns(found: Iterable[tuple[int, Layers]]) -> list[tuple[int, Layers]]:
    """Keep the first run of each row of the table: a roundtrip has no seed."""
    first: dict[int, Layers] = {}
    for row, layers in found:
        if layers:
            first.setdefault(row, layers)
    return sorted(first.items())
