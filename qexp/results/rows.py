"""The experiments of a sweep as rows, read back from its manifest and its run folders.

A run folder is the truth about its experiment, and may be newer than the manifest (the same experiment was run again,
alone or in another sweep); the manifest speaks for experiments that never got a folder, and for a failure that left an
older result as it was. A file that is damaged costs its own row: status `damaged`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from qexp.errors import DamagedFileError, DiskError
from qexp.results.labels import run_label
from qexp.results.manifest import Manifest
from qexp.results.run_folder import RunFolder
from qexp.system.files import read_yaml

Row = dict[str, Any]
GONE = ("missing", "damaged")  # statuses of an experiment that had a result, which cannot be read now


def sweep_names(outputs: Path | str) -> list[str]:
    """Return names of the sweeps in an outputs folder, the one that started last at the end."""
    folders = [path.parent.name for path in Path(outputs, "sweeps").glob("*/manifest.json")]
    return sorted(folders, key=lambda name: (_read_start(outputs, name), name))


def _read_start(outputs: Path | str, name: str) -> str:
    try:
        return str(read_manifest(outputs, name).get("started"))
    except DiskError:  # reported when it is the one that is asked for
        return ""


def read_manifest(outputs: Path | str, name: str) -> dict[str, Any]:
    return Manifest(outputs, name).read() or {"jobs": []}


def rows_of_sweep(outputs: Path | str, name: str) -> list[Row]:
    """Return one dict per experiment, in the order of the manifest.

    Keys: those of a job in the manifest (number, key, overrides, status, reason, message, reused, seconds), and
    label, metrics, config (the stored container), env and folder; the last three are None without a run folder.
    Raises: DiskError for a manifest that is damaged.
    """
    return rows_of_jobs(read_manifest(outputs, name), [Path(outputs, "runs")])


def rows_of_jobs(manifest: Mapping[str, Any], places: Sequence[Path]) -> list[Row]:
    """Return `rows_of_sweep` of a manifest whose runs are in `places`, folders of run folders; the first one counts."""
    return [_row(job, RunFolder(_find_run(str(job["key"]), places))) for job in manifest["jobs"]]


def _find_run(key: str, places: Sequence[Path]) -> Path:
    """Return the folder of a run; if it is in no place, where it belongs. Raises: DamagedFileError for a path."""
    if Path(key).name != key or key == "..":
        raise DamagedFileError(places[0], f"a sweep names {key!r} as a run, which is no key")
    return next((path for place in places if (path := place / key).is_dir()), places[0] / key)


def row_of_run(path: Path, number: int) -> Row:
    """Return the row of a run folder that may be of no sweep, and may have any name."""
    folder, key = RunFolder(path), path.name
    with suppress(DiskError):  # its row says so
        key = str((folder.read_result() or {}).get("key", key))
    return _row({"number": number, "key": key, "overrides": _read_overrides(path), "status": "done"}, folder)


def _read_overrides(path: Path) -> list[str]:
    """Return what was typed for a run; [] where that is not there."""
    try:
        return (path / "overrides.txt").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []


def _row(job: Mapping[str, Any], folder: RunFolder) -> Row:
    row: Row = {"reason": None, "message": "", "reused": False, "seconds": None, **job}
    row |= {"label": job.get("label") or " ".join(job["overrides"]), "metrics": {}}
    row |= dict.fromkeys(("config", "env", "folder"))
    if not job["key"] or not folder.path.is_dir():
        return row | _missing(folder.path) if job["status"] == "done" else row
    row["folder"] = folder.path
    try:
        return row | _read_labels(folder) | _read_ending(job, folder)
    except DiskError as error:
        return row | _damaged_row(str(error))
    except (KeyError, TypeError, AttributeError) as error:
        return row | _damaged_row(f"{folder.path}: lacks what a run leaves ({error!r}); run it again")


def _read_labels(folder: RunFolder) -> Row:
    config = read_yaml(folder.path / "config.yaml")
    return {"config": config, "label": run_label(config)} if config is not None else {}


def _read_ending(job: Mapping[str, Any], folder: RunFolder) -> Row:
    """Return how the experiment ended, and its numbers if it did well."""
    status = folder.read_status()
    if status is None:
        return _missing(folder.path / "status.json") if job["status"] == "done" else {}
    found = {"status": status.status, "reason": status.reason, "message": status.message, "seconds": status.seconds}
    if status.status != "done":
        return found
    if job["status"] == "failed" and job.get("kept") == status.started:
        return {}  # it was to be scored again, and that failed; the result is from before
    result = folder.read_result()
    return found | (
        {"metrics": result["metrics"], "env": dict(result["env"])} if result else _missing(folder.path / "result.json")
    )


def _damaged_row(message: str) -> Row:
    return {"status": "damaged", "reason": None, "message": message}


def _missing(path: Path) -> Row:
    return {"status": "missing", "message": f"{path} is gone; run the experiment again"}
