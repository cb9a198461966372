"""sweep.objectives: the metrics whose values an experiment returns to Hydra's sweeper.

Sweepers that search (optuna, nevergrad, ax) take a number for each objective and minimize it, unless a setting of
theirs says otherwise. Values are returned as they are, so that setting has to agree with the direction in which a
metric is better (`qexp/metrics/registry.py`). An experiment without all of its objectives returns None: the sweeper
then counts it as failed, and goes on if its own settings say so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from typing import Any

from qexp.errors import ConfigError, choices, did_you_mean
from qexp.metrics.registry import all_metrics, is_infinite

DIRECTIONS = {"higher": "maximize", "lower": "minimize"}


def check_objectives(names: Sequence[str]) -> None:
    """Raise ConfigError for a name that is no metric, has no better direction, or is named twice."""
    known = [name for name, metric in all_metrics().items() if metric.better and "*" not in name]
    for name in names:
        if name not in all_metrics():
            raise ConfigError(f"sweep.objectives={name} is unknown{did_you_mean(name, known)}; use {choices(known)}")
        if name not in known:
            raise ConfigError(f"sweep.objectives={name}: neither more nor less of it is better; use {choices(known)}")
        if names.count(name) > 1:
            raise ConfigError(f"sweep.objectives={name} is there {names.count(name)} times; name it once")


def check_sweeper(names: Sequence[str], sweeper: Mapping[str, Any], dry_run: bool) -> None:
    """Check that the settings of a sweeper that searches suit the objectives. sweeper: the node hydra.sweeper.

    Raises: ConfigError if there are none, if it searches in another direction, or for a dry run.
    """
    found = _directions_of(sweeper)
    if found is None:
        return
    setting, directions = found
    if dry_run:
        raise ConfigError("sweep.dry_run=true runs nothing that this sweeper could search by; use hydra/sweeper=qexp")
    if not names:
        raise ConfigError(
            "sweep.objectives=[] names no metric for this sweeper; set sweep.objectives=[quality/psnr_db]"
        )
    wanted = [DIRECTIONS[all_metrics()[name].better] for name in names]
    if directions != wanted:
        remedy = f"[{','.join(wanted)}]" if len(wanted) > 1 else wanted[0]
        remedy = remedy if setting.endswith("direction") else f"the one for {remedy}"
        raise ConfigError(
            f"{setting} is to {' and '.join(directions)}, but sweep.objectives=[{','.join(names)}] are better if one "
            f"{' and '.join(wanted)}s them; set it to {remedy}"
        )


def _directions_of(sweeper: Mapping[str, Any]) -> tuple[str, list[str]] | None:
    """(setting, directions) of a sweeper that searches; None of one that does not."""
    if sweeper.get("direction") is not None:  # optuna: one, or a list, of words or of an enum
        value = sweeper["direction"]
        values = [value] if isinstance(value, str) or not isinstance(value, Sequence) else value
        return "hydra.sweeper.direction", [str(getattr(each, "name", each)) for each in values]
    if "maximize" in (optim := sweeper.get("optim") or {}):  # nevergrad
        return "hydra.sweeper.optim.maximize", ["maximize" if optim["maximize"] else "minimize"]
    experiment = (sweeper.get("ax_config") or {}).get("experiment") or {}
    if "minimize" in experiment:
        return "hydra.sweeper.ax_config.experiment.minimize", ["minimize" if experiment["minimize"] else "maximize"]
    return None


def check_measured(names: Sequence[str], task: str, scored: Sequence[str], isolation: str) -> None:
    """Raise ConfigError for an objective that this experiment would not measure.

    Args:
        scored: metrics.names. isolation: isolation.mode.
    """
    for name in names:
        metric = all_metrics()[name]
        if task not in metric.tasks:
            raise ConfigError(f"sweep.objectives={name} is not measured by task={task}; use {choices(metric.tasks)}")
        if metric.compute and metric.is_chosen and metric.short_name not in scored:
            raise ConfigError(f"sweep.objectives={name} is not scored; add {metric.short_name} to metrics.names")
        if metric.is_of_process and isolation == "inline":
            raise ConfigError(f"sweep.objectives={name} is not measured with isolation=inline; use isolation=process")


def objective_values(names: Sequence[str], metrics: Mapping[str, float | None]) -> float | tuple[float, ...] | None:
    """Return what Hydra's sweepers take: a number, or one for each of several objectives.

    None if an objective has no value. One that is null because nothing differs is infinite.
    """
    values = [inf if is_infinite(metrics, all_metrics()[name]) else metrics.get(name) for name in names]
    numbers = tuple(value for value in values if value is not None)
    if len(numbers) < len(names):
        return None
    return numbers[0] if len(names) == 1 else numbers
