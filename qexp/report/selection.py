"""What a report is about: sweeps and runs, named, or copied from another machine, as rows of one table.

A word is the name of a sweep, the key of a run, or a path: of a sweep's folder, of a run's, of an outputs folder (all
that is in it), or of an unpacked bundle. The runs of a sweep are looked for in the outputs folder that it is in, then
beside it, then in the outputs folders of the other words: a sweep may have been copied without the rest.

Of several, the rows are numbered anew, and `sweep` says where each is from. A run that is in two sweeps is one row.
"""

from __future__ import annotations

import os
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qexp.errors import ConfigError, DamagedFileError, choices, did_you_mean
from qexp.results.manifest import Manifest
from qexp.results.rows import Row, row_of_run, rows_of_jobs, sweep_names
from qexp.system.files import read_json

MANIFEST = "manifest.json"
OF_A_RUN = ("config.yaml", "status.json", "result.json")
UNKNOWN: dict[str, Any] = {"notes": None, "total": None, "finished": None}  # of a manifest that does not say
LONGEST_NAME = 80  # characters of a folder that is named after several sweeps


@dataclass(frozen=True)
class SweepRows:
    """A sweep and its rows.

    folder: where its manifest.json is; None for runs that were named one by one, which have none.
    """

    name: str
    folder: Path | None
    manifest: Mapping[str, Any]
    rows: list[Row]


@dataclass(frozen=True)
class Selection:
    """sweeps: each with its own rows; rows: all of them, each run once, as the table has them."""

    outputs: Path
    sweeps: tuple[SweepRows, ...]
    rows: list[Row]

    @property
    def title(self) -> str:
        """'first', 'first + second', 'run 7e5db7dc326160b2', '3 runs'."""
        return " + ".join(sweep.name for sweep in self.sweeps)

    @property
    def manifest(self) -> Mapping[str, Any]:
        """Return the sweep's manifest; of several one that sums them up, without a command."""
        if len(self.sweeps) == 1:
            return self.sweeps[0].manifest
        parts = [sweep.manifest for sweep in self.sweeps]
        not_run = sum(max((sweep.manifest["total"] or 0) - len(sweep.rows), 0) for sweep in self.sweeps)
        return {
            "name": self.title, "notes": None, "command": [], "total": len(self.rows) + not_run,
            "started": min(filter(None, (part["started"] for part in parts)), default=None),
            "finished": all(part["finished"] for part in parts),
        }  # fmt: skip

    @property
    def folder(self) -> Path:
        """Return where its report goes: the sweep's own folder, of several <outputs>/reports/<names>."""
        if len(self.sweeps) == 1 and self.sweeps[0].folder is not None:
            return self.sweeps[0].folder
        name = "+".join(sweep.name.replace(" ", "_") for sweep in self.sweeps)
        names = repr([[str(row["folder"]) for row in sweep.rows] for sweep in self.sweeps])
        is_known = all(sweep.folder is not None or len(sweep.rows) == 1 for sweep in self.sweeps)  # not of '3 runs'
        if len(name) > LONGEST_NAME or not is_known:
            name = f"{name[:LONGEST_NAME]}_{zlib.crc32(names.encode()):08x}"
        return self.outputs / "reports" / name


def select(outputs: Path | str, words: Sequence[str] = ()) -> Selection:
    """Return the sweeps and runs that the words name; without a word the latest sweep, or all runs if there is none.

    Raises: ConfigError for a word that names nothing, DiskError for a manifest that is damaged.
    """
    outputs = Path(outputs)
    named = {path.resolve(): path for word in words for path in _find_word(outputs, word)}
    found = list(named.values()) or _find_latest(outputs)
    manifests = {path: _read_manifest(path) for path in found if _is_sweep(path)}
    places = [outputs / "runs", *dict.fromkeys(place for path in manifests for place in _places_of_runs(path))]
    names = _distinct_names(list(manifests))
    sweeps = [
        SweepRows(names[path], path, manifest, rows_of_jobs(manifest, [*_places_of_runs(path), *places]))
        for path, manifest in manifests.items()
    ]
    alone = [path for path in found if path not in manifests]
    if runs := [row_of_run(path, number) for number, path in enumerate(alone, start=1)]:
        name = f"run {runs[0]['key']}" if len(runs) == 1 else f"{len(runs)} runs"
        none = UNKNOWN | {"name": name, "command": [], "started": None, "finished": True}
        sweeps.append(SweepRows(name, None, none, runs))
    rows = sweeps[0].rows if len(sweeps) == 1 and sweeps[0].folder else _unite(sweeps)
    return Selection(outputs, tuple(sweeps), rows)


def _find_latest(outputs: Path) -> list[Path]:
    if names := sweep_names(outputs):
        return [outputs / "sweeps" / names[-1]]
    if runs := _runs_in(outputs / "runs"):
        return runs
    raise ConfigError(
        f"{outputs / 'sweeps'} holds no sweep; run one with python -m qexp -m, or give the right --outputs"
    )


def _find_word(outputs: Path, word: str) -> list[Path]:
    """Return the folders of the sweeps and runs that a word names."""
    if word and Path(word).name == word:  # else a path
        for path in (outputs / "sweeps" / word, outputs / "runs" / word):
            if _is_sweep(path) or _is_run(path):
                return [path]
    path = Path(word)
    if word and os.path.isdir(path):
        return _find_in_folder(path if path.name not in ("", "..") else path.resolve())
    if path.suffix == ".zip" and os.path.isfile(path):
        raise ConfigError(f"{word} is a zip file; unpack it, and give the folder")
    names = sweep_names(outputs)
    if not names and not _runs_in(outputs / "runs"):
        raise ConfigError(
            f"{word!r} names nothing: {outputs} holds no sweep and no run; give the right --outputs, or the path of a "
            "sweep's or a run's folder"
        )
    raise ConfigError(
        f"sweep {word!r} is not in {outputs / 'sweeps'}{did_you_mean(word, names)}; use {choices(names)}, the key of a "
        "run, or the path of a sweep's or a run's folder"
    )


def _find_in_folder(path: Path) -> list[Path]:
    if path.resolve().parent.name == "references" and _is_run(path):
        raise ConfigError(f"{path} is a reference, which runs are compared with, and not a run; give a run's folder")
    if _is_sweep(path) or _is_run(path):
        return [path]
    for outputs in (path, path / "outputs"):
        sweeps = [outputs / "sweeps" / name for name in sweep_names(outputs)]
        if found := [*sweeps, *_runs_of_no_sweep(outputs, sweeps)]:
            return found
    raise ConfigError(
        f"{path} holds neither a sweep ({MANIFEST}) nor a run (result.json), and is no outputs folder (sweeps/, "
        "runs/); give the name of a sweep, the key of a run, or the path of such a folder"
    )


def _runs_of_no_sweep(outputs: Path, sweeps: Iterable[Path]) -> list[Path]:
    keys = {job["key"] for path in sweeps for job in _read_manifest(path)["jobs"]}
    return [path for path in _runs_in(outputs / "runs") if path.name not in keys]


def _runs_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if not path.name.startswith(".") and _is_run(path))


def _read_manifest(folder: Path) -> Mapping[str, Any]:
    """Read a manifest. Raises: DamagedFileError for a manifest.json of something else, DiskError."""
    values = read_json(folder / MANIFEST) or {}
    if not isinstance(values.get("jobs"), list) or not all(name in values for name in ("started", "command")):
        raise DamagedFileError(folder / MANIFEST, "it is not that of a sweep", "give another folder")
    return UNKNOWN | (Manifest("", folder.name, folder).read() or {}) | {"name": folder.name}


def _is_sweep(path: Path) -> bool:
    return os.path.isfile(path / MANIFEST)  # False for a word that is too long to be a name


def _is_run(path: Path) -> bool:
    return any(os.path.isfile(path / name) for name in OF_A_RUN)


def _places_of_runs(sweep: Path) -> list[Path]:
    """Return where the runs of a sweep's folder may be: <outputs>/sweeps/<name> has them in <outputs>/runs."""
    here = sweep if sweep.parent.name == "sweeps" else sweep.resolve()
    return [here.parent.parent / "runs", here.parent / "runs", here / "runs", here / "outputs" / "runs"]


def _distinct_names(folders: Sequence[Path]) -> dict[Path, str]:
    """Return folder -> name; for sweeps of one name, in several outputs folders, with the folder that differs."""
    parts = {folder: folder.resolve().parts for folder in folders}
    names = {}
    for folder, own in parts.items():
        others = [theirs for other, theirs in parts.items() if other != folder and theirs[-1] == own[-1]]
        depth = next((n for n in range(1, len(own)) if all(t[-n:] != own[-n:] for t in others)), len(own))
        names[folder] = own[-1] if depth == 1 else f"{own[-1]} ({own[-depth]})"
    return names


def _unite(sweeps: Sequence[SweepRows]) -> list[Row]:
    """Return the rows of all, numbered anew, each with the sweeps that it is in; a run that was copied is the same run.

    Runs of one key with different results (the same experiment on two machines) stay two: `copy` tells them apart.
    """
    united: dict[object, Row] = {}
    names: dict[object, dict[str, None]] = {}
    for sweep in sweeps:
        for row in sweep.rows:
            identity = _identity(row, sweep)
            united.setdefault(identity, row)
            names.setdefault(identity, {}).update({sweep.name: None} if sweep.folder else {})
    rows = [row | {"number": number} for number, row in enumerate(united.values(), start=1)]
    if len(sweeps) > 1:
        rows = [row | {"sweep": ", ".join(found)} for row, found in zip(rows, names.values(), strict=True)]
    keys = Counter(row["key"] for row in rows if row["folder"])
    return [row | {"copy": row["number"]} if row["folder"] and keys[row["key"]] > 1 else row for row in rows]


def _identity(row: Row, sweep: SweepRows) -> object:
    if not row["key"]:
        return sweep.name, row["number"]  # an experiment that never got a run
    if row["folder"] is None:
        return row["key"], row["status"]
    for name in ("result.json", "status.json"):
        with suppress(OSError):
            return row["key"], (row["folder"] / name).read_bytes()
    return row["key"], str(row["folder"].resolve())
