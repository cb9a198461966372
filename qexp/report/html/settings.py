"""Configurations and environments of all runs, once where they are the same, and the commands that repeat the runs."""

from __future__ import annotations

import json
import os
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qexp.report.results_csv import flatten_config
from qexp.results.rows import Row

ABSENT = None  # of a run that does not have a setting which most have
HIDDEN = ("date",)  # differs always, and changes nothing


def shared_settings(values: Sequence[Mapping[str, str]]) -> tuple[dict[str, str], list[dict[str, str | None]]]:
    """Return what most of the runs have, and how each differs from that; None stands for a setting that it lacks.

    A run without any settings (it has no folder) differs in nothing.
    """
    present = [each for each in values if each]
    names = dict.fromkeys(name for each in present for name in each)
    base: dict[str, str] = {}
    for name in names:
        usual = Counter(each.get(name) for each in present).most_common(1)[0][0]
        base[name] = usual if usual is not None else next(each[name] for each in present if name in each)
    return base, [_differences(each, base) if each else {} for each in values]


def _differences(values: Mapping[str, str], base: Mapping[str, str]) -> dict[str, str | None]:
    return {name: values.get(name, ABSENT) for name in base if values.get(name, ABSENT) != base[name]}


def config_texts(row: Row) -> dict[str, str]:
    """Return every setting of a run, its dotted path -> its value as JSON writes it."""
    return {name: _text_of(value) for name, value in flatten_config(row["config"] or {})}


def env_texts(row: Row) -> dict[str, str]:
    """Return the environment of a run; versions by the names of packages."""
    env = dict(row["env"] or {})
    versions = {name: version for name, version in (env.pop("versions", None) or {}).items() if version is not None}
    return {name: _text_of(value) for name, value in {**env, **versions}.items() if name not in HIDDEN}


def _text_of(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def repeating_command(row: Row) -> str:
    """Return the shell command that runs an experiment again, where its outputs folder lies; or as it was typed."""
    if row["folder"] is None:
        return typed_command(row)
    folder = Path(row["folder"])
    if folder.parent.name == "runs":
        folder = Path(folder.absolute().parents[1].name, "runs", folder.name)
    return shlex.join(["python", "-m", "qexp", "rerun", folder.as_posix()])


def typed_command(row: Row) -> str:
    """Return the command of one experiment as it was typed; '' for the defaults."""
    overrides = list(row["overrides"])
    is_sweep = any(override.startswith("experiment=") for override in overrides)  # may bring a sweep of its own
    mode = ["hydra.mode=RUN"] if is_sweep else []
    return shlex.join(["python", "-m", "qexp", *mode, *overrides])


def folder_link(row: Row, folder: Path) -> str:
    """Return the run's folder relative to that of the report, as a link; '' without one."""
    return "" if row["folder"] is None else os.path.relpath(row["folder"], folder).replace(os.sep, "/")
