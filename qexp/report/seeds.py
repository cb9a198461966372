"""Experiments that differ in their seed alone are one row: mean, standard deviation and n of each metric.

So no table and no Pareto front can pick the best of several seeds. The same run twice in a sweep counts once.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from qexp.metrics.registry import find_metric, is_infinite
from qexp.results.rows import Row

NOT_SETTINGS = ("tracking", "isolation", "sweep", "paths", "resume", "loader")  # change no result
NOT_COMPARED = (*NOT_SETTINGS, "seed", "metrics", "save")


def with_seeds_united(rows: Sequence[Row]) -> list[Row]:
    """Return the rows, those of each group as one in the place of its first; see `_united`."""
    members: dict[str, list[Row]] = {}
    for row in rows:
        members.setdefault(_setting(row) or f"row {row['number']}", []).append(row)
    return [row for group in members.values() for row in ([_united(group)] if _differ_in_seed(group) else group)]


def seed_groups(rows: Sequence[Row]) -> dict[int, str]:
    """Return the name of its group, the key of the group's first run, for each row's number."""
    united = [row for row in with_seeds_united(rows) if "members" in row]
    return {member["number"]: row["key"] for row in united for member in row["members"]}


def _setting(row: Row) -> str | None:
    """Return the settings that experiments of a group share; None for a row without a result."""
    if row["status"] != "done" or not row.get("config"):
        return None
    kept = {name: value for name, value in row["config"].items() if name not in NOT_COMPARED}
    kept["copy"] = row.get("copy")  # `selection.py`: of two results of one run neither stands for the other
    return json.dumps(kept, sort_keys=True, default=str)


def _differ_in_seed(group: Sequence[Row]) -> bool:
    """Return whether there is one run for each of several seeds; two for one seed differ in a file."""
    seeds = [(row.get("config") or {}).get("seed") for row in {row["key"]: row for row in group}.values()]
    return len(seeds) > 1 and len(set(seeds)) == len(seeds)


def _united(group: Sequence[Row]) -> Row:
    """Return one row for a group.

    metrics: means; spread: standard deviations of those that are not the same in all runs; counts: how many runs have
    the metric; seeds: how many runs there are; members: the rows.
    """
    runs = list({row["key"]: row for row in group}.values())
    metrics: dict[str, float | None] = {}
    spread, counts = dict[str, float](), dict[str, int]()
    for name in dict.fromkeys(name for run in runs for name in run["metrics"]):
        values = [run["metrics"][name] for run in runs if run["metrics"].get(name) is not None]
        metrics[name] = statistics.fmean(values) if values and _has_mean(name, runs) else None
        counts[name] = len(values)
        if metrics[name] is not None and len(values) > 1 and min(values) < max(values):
            spread[name] = statistics.stdev(values)
    overrides = [one for one in group[0]["overrides"] if one.partition("=")[0].lstrip("+") != "seed"]
    united = {"metrics": metrics, "spread": spread, "counts": counts, "seeds": len(runs), "members": list(group)}
    first = {name: value for name, value in group[0].items() if name not in ("intervals", "versus")}  # of it alone
    return {**first, "overrides": overrides, "reused": all(row["reused"] for row in group), **united}


def _has_mean(name: str, runs: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether no run's value is undefined. One that is infinite is left out, and the count says so."""
    metric = find_metric(name)
    return all(
        run["metrics"].get(name) is not None or (metric is not None and is_infinite(run["metrics"], metric))
        for run in runs
    )
