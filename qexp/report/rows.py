"""The experiments of a sweep as rows, read back from its manifest and its run folders.

A run folder is the truth about its experiment, and may be newer than the manifest (the same experiment was run again,
alone or in another sweep); the manifest speaks for experiments that never got a folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from qexp.errors import ConfigError, DiskError, choices, did_you_mean
from qexp.report.labels import run_label
from qexp.sweep.store import RunFolder, read_json

Row = dict[str, Any]


def sweep_names(outputs: Path | str) -> list[str]:
    """Names of the sweeps in an outputs folder, the one that started last at the end."""
    folders = [path.parent.name for path in Path(outputs, "sweeps").glob("*/manifest.json")]
    return sorted(folders, key=lambda name: (str(read_manifest(outputs, name).get("started")), name))


def find_sweep(outputs: Path | str, name: str | None) -> str:
    """`name` if there is such a sweep, the latest for None. Raises ConfigError that lists those there."""
    place = Path(outputs, "sweeps")
    if name is not None and (place / name / "manifest.json").exists():
        return name
    names = sweep_names(outputs)
    if not names:
        raise ConfigError(f"{place} holds no sweep; run one with python -m qexp -m, or give the right --outputs")
    if name is not None:
        raise ConfigError(f"sweep {name!r} is not in {place}{did_you_mean(name, names)}; use {choices(names)}")
    return names[-1]


def read_manifest(outputs: Path | str, name: str) -> dict[str, Any]:
    return read_json(Path(outputs, "sweeps", name, "manifest.json")) or {"jobs": []}


def rows_of_sweep(outputs: Path | str, name: str) -> list[Row]:
    """One dict per experiment, in the order of the manifest.

    Keys: those of a job in the manifest (number, key, overrides, status, reason, message, reused, seconds), and
    label, metrics, config (the stored container), env and folder; the last three are None without a run folder.
    Raises: ConfigError for an unknown sweep, DiskError for a file that is damaged.
    """
    jobs = read_manifest(outputs, find_sweep(outputs, name))["jobs"]
    return [_row(job, RunFolder(Path(outputs, "runs", str(job["key"])))) for job in jobs]


def _row(job: dict[str, Any], folder: RunFolder) -> Row:
    row: Row = {"reason": None, "message": "", "reused": False, "seconds": None, **job}
    row |= {
        "label": job.get("label") or " ".join(job["overrides"]),
        "metrics": {},
        "config": None,
        "env": None,
        "folder": None,
    }
    if not job["key"] or not folder.path.is_dir():
        return row | _missing("its run folder") if job["status"] == "done" else row
    row |= {"folder": folder.path, "config": read_yaml(folder.path / "config.yaml")}
    if row["config"] is not None:
        row["label"] = run_label(row["config"])
    if (status := folder.read_status()) is not None:
        row |= {"status": status.status, "reason": status.reason, "message": status.message, "seconds": status.seconds}
    if row["status"] != "done":
        return row
    result = folder.read_result()
    return row | ({"metrics": result["metrics"], "env": result["env"]} if result else _missing("its result.json"))


def _missing(what: str) -> Row:
    return {"status": "missing", "message": f"{what} is gone; run the experiment again"}


def read_yaml(path: Path) -> dict[str, Any] | None:
    """The mapping in a file, None if there is no file. Raises DiskError if it holds something else."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except FileNotFoundError:
        return None
    except (OSError, yaml.YAMLError) as error:
        raise DiskError(f"{path}: cannot be read ({error}); delete {path.parent} and run it again") from error
    if not isinstance(content, dict):
        raise DiskError(f"{path}: must hold a configuration; delete {path.parent} and run it again")
    return content
