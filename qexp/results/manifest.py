"""outputs/sweeps/<name>/manifest.json: what a sweep is made of and how far it is.

Each experiment adds itself under a lock when it ends, so launchers that run jobs in other processes work too. The
results themselves are in the run folders; a job that never got that far has an empty key.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qexp.errors import ConfigError
from qexp.results.run_folder import is_alive, now_iso
from qexp.system.files import file_lock, read_json, write_json

JOB_FIELDS = ("number", "key", "label", "overrides", "status", "reason", "message", "reused", "seconds")


@dataclass(frozen=True)
class JobRow:
    """One experiment of a sweep. number counts from 1; status: done, failed, unsupported or skipped (left alone)."""

    number: int
    key: str
    overrides: tuple[str, ...]
    label: str
    status: str
    reason: str | None = None
    message: str = ""
    reused: bool = False
    seconds: float = 0.0
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    rescored: bool = False  # only metrics were added to it; `seconds` is of the run


class Manifest:
    """The manifest of one sweep, `outputs/sweeps/<name>`."""

    def __init__(self, outputs: str | Path, name: str) -> None:
        self.name = name
        self.folder = Path(outputs, "sweeps", name)
        self.path = self.folder / "manifest.json"

    def start(self, command: Sequence[str], total: int | None, notes: str | None = None) -> None:
        """Begin anew. total: planned experiments, None if a sweeper decides as it goes.

        Raises: ConfigError if a running sweep has this name, DiskError if the folder cannot be written.
        """
        with file_lock(self.folder / ".lock"):
            old = read_json(self.path)
            if old is not None and _is_running(old):
                raise ConfigError(
                    f"sweep.name={self.name} is in use by process {old['pid']}, which writes {self.path}; "
                    "wait for it, or give this sweep a name of its own: sweep.name=<name>"
                )
            values = {"name": self.name, "command": list(command), "notes": notes, "pid": os.getpid(), "total": total}
            write_json(self.path, values | {"started": now_iso(), "finished": None, "jobs": []})

    def add(self, row: JobRow) -> dict[str, Any]:
        """Record a finished job, in the place of one with the same number; returns the new contents."""
        with file_lock(self.folder / ".lock"):
            values = self._read()
            job = {name: value for name, value in asdict(row).items() if name in JOB_FIELDS} | {"recorded": now_iso()}
            others = [other for other in values["jobs"] if other["number"] != row.number]
            values["jobs"] = sorted([*others, job], key=lambda other: int(other["number"]))
            write_json(self.path, values)
        return values

    def finish(self) -> dict[str, Any]:
        """Note the end; returns the final contents."""
        with file_lock(self.folder / ".lock"):
            values = self._read() | {"finished": now_iso()}
            write_json(self.path, values)
        return values

    def read(self) -> dict[str, Any] | None:
        """The contents, None for a sweep that has not started."""
        return read_json(self.path)

    def _read(self) -> dict[str, Any]:
        unknown: dict[str, Any] = {"command": [], "notes": None, "total": None, "finished": None, "jobs": []}
        return read_json(self.path) or {"name": self.name, "started": now_iso(), **unknown}


def count_line(jobs: Iterable[Mapping[str, Any]], total: int | None = None) -> str:
    """'12 experiments: 10 done (3 reused), 1 unsupported, 1 failed'; with a total, those without a record too."""
    jobs = list(jobs)
    counts = Counter(job["status"] for job in jobs)
    reused = sum(job["reused"] for job in jobs if job["status"] == "done")
    parts = [f"{counts['done']} done" + (f" ({reused} reused)" if reused else "")]
    others = dict.fromkeys(("unsupported", "skipped", "failed", *counts))
    parts += [f"{counts[status]} {status}" for status in others if counts[status] and status != "done"]
    missing = max((total or 0) - len(jobs), 0)
    parts += [f"{missing} not run, or cut off"] if missing else []
    number = len(jobs) + missing
    return f"{number} experiment{'' if number == 1 else 's'}: {', '.join(parts)}"


def _is_running(values: Mapping[str, Any]) -> bool:
    pid = values.get("pid")
    return not values.get("finished") and pid not in (None, os.getpid()) and is_alive(int(pid), values["started"])
