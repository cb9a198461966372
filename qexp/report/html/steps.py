"""What was recorded step by step: memory of host and device, time, and the distance from the reference.

Read from history.csv, or memory.csv of a run that was never scored, and load_memory.csv. A run of many steps is thinned
to points that are evenly spaced, the first and the last among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from qexp.report.html.tables import number_of, read_table
from qexp.results.rows import Row
from qexp.results.run_folder import LOAD_MEMORY

FILES = ("history.csv", "memory.csv")
POINTS, MOST_POINTS = 8_000, 120  # of all runs; of one run
DIGITS = {"step": 9, "host_gib": 8}  # significant ones; of the host's memory, most are taken by its baseline


def steps_of(row: Row, number: int, table_row: int, points: int = MOST_POINTS) -> dict[str, Any] | None:
    """Return the steps of a run; None for one that recorded none.

    run, row; step: numbers; seconds: time since the first one began; ms: of a step; host, device: GiB, the host's above
    the memory from before loading; error: relative L2 distance of the state from the reference's. A series without a
    value is left out. load: {seconds, host, device, trace}: how long loading took, its peaks, and [seconds, GiB] of the
    host over that time, where it was recorded.
    Raises: DamagedFileError, DiskError.
    """
    path = next((path for name in FILES if (path := row["folder"] / name).is_file()), None)
    lines = read_table(path, ("step", "step_ms")) if path else []
    if path is None or not lines:
        return None
    numbers = {name: [number_of(line.get(name), path, DIGITS.get(name, 4)) for line in lines] for name in lines[0]}
    baseline = row["metrics"].get("load/baseline_host_gib")
    series: dict[str, Sequence[float | None]] = {
        "step": [None if step is None else int(step) for step in numbers["step"]],
        "seconds": [float(f"{total:.5g}") for total in accumulate((ms or 0.0) / 1000 for ms in numbers["step_ms"])],
        "ms": numbers["step_ms"],
        "host": [] if baseline is None else [_above(value, baseline) for value in numbers.get("host_gib", [])],
        "device": numbers.get("device_gib", []) if any(numbers.get("device_gib", [])) else [],
        "error": numbers.get("relative_l2", []),
    }
    kept = _places(len(lines), points)
    shown = {
        name: [values[place] for place in kept]
        for name, values in series.items()
        if any(value is not None for value in values)
    }
    load = {**_loading(row), "trace": [] if baseline is None else _load_trace(row["folder"], baseline, points)}
    return {"run": number, "row": table_row, **shown, "load": load}


def _above(value: float | None, baseline: float) -> float | None:
    return None if value is None else float(f"{value - baseline:.4g}")


def _loading(row: Row) -> dict[str, float | None]:
    names = {"seconds": "load/seconds", "host": "load/peak_host_gib", "device": "load/peak_device_gib"}
    found = {key: row["metrics"].get(name) for key, name in names.items()}
    return {key: None if value is None else float(f"{value:.5g}") for key, value in found.items()}


def _load_trace(folder: Path, baseline: float, points: int) -> list[list[float | None]]:
    path = folder / LOAD_MEMORY
    lines = read_table(path, ("seconds", "host_gib"))
    kept = [lines[place] for place in _places(len(lines), points)]
    return [
        [number_of(line["seconds"], path, 4), _above(number_of(line["host_gib"], path, 8), baseline)] for line in kept
    ]


def _places(count: int, most: int) -> list[int]:
    most = max(most, 2)
    return list(range(count)) if count <= most else [round(k * (count - 1) / (most - 1)) for k in range(most)]


def points_for(runs: int) -> int:
    """Return how many points each of so many runs may have."""
    return max(min(MOST_POINTS, POINTS // max(runs, 1)), 2)
