"""outputs/sweeps/<name>/manifest.json: what a sweep is made of and how far it is.

Each experiment adds itself under a lock when it ends, so launchers that run jobs in other processes work too: a line of
jobs.jsonl, which the end of the sweep puts into manifest.json. Writing all of a thousand experiments after each of them
would take longer than passing over them. The results themselves are in the run folders; a job that never got that far
has an empty key.
"""

from __future__ import annotations

import json
import os
import sys
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qexp.errors import ConfigError, DamagedFileError
from qexp.results.run_folder import is_alive, now_iso, start_ticks
from qexp.system.files import append_line, disk_error, file_lock, read_json, write_json

JOB_FIELDS = ("number", "key", "label", "overrides", "status", "reason", "message", "reused", "seconds", "kept")


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
    kept: str | None = None  # when the result began that an attempt which failed has left as it was


class Manifest:
    """The manifest of one sweep, `outputs/sweeps/<name>`."""

    def __init__(self, outputs: str | Path, name: str, folder: Path | None = None) -> None:
        """folder: of a sweep that was copied out of its outputs folder."""
        self.name = name
        self.folder = folder or Path(outputs, "sweeps", name)
        self.path = self.folder / "manifest.json"
        self.added = self.folder / "jobs.jsonl"

    def start(
        self, command: Sequence[str], total: int | None, notes: str | None = None, varying: Sequence[str] = ()
    ) -> None:
        """Begin anew. total: planned experiments, None if a sweeper decides as it goes. varying: names of the settings
        that differ between them.

        The token tells what this sweep has done from what others did, whatever a clock says.
        Raises: ConfigError if a running sweep has this name, DiskError if the folder cannot be written.
        """
        with file_lock(self.folder / ".lock"):
            old = self._read_old()
            if old is not None and _is_running(old):
                raise ConfigError(
                    f"sweep.name={self.name} is in use by process {old['pid']}, which writes {self.path}; "
                    "wait for it, or give this sweep a name of its own: sweep.name=<name>"
                )
            values = {"name": self.name, "command": list(command), "notes": notes, "total": total}
            values |= {"varying": list(varying)}
            values |= {"pid": os.getpid(), "ticks": start_ticks(os.getpid())}
            values |= {"token": uuid.uuid4().hex, "started": now_iso(), "finished": None, "jobs": []}
            self._write(values)

    def _read_old(self) -> dict[str, Any] | None:
        """Return the sweep of this name before; a damaged manifest is kept beside the new one."""
        try:
            return read_json(self.path)
        except DamagedFileError as error:
            kept = self.path.with_name(f"{self.path.name}.damaged")
            os.replace(self.path, kept)
            print(f"{self.path} is damaged ({error.what}); it is kept as {kept.name}", file=sys.stderr)
            return None

    def add(self, row: JobRow) -> dict[str, Any]:
        """Record a finished job, in the place of one with the same number; returns the new contents."""
        job = {name: value for name, value in asdict(row).items() if name in JOB_FIELDS} | {"recorded": now_iso()}
        with file_lock(self.folder / ".lock"):
            values = self._read()
            if not self.path.exists():
                write_json(self.path, values)
            append_line(self.added, json.dumps(job, ensure_ascii=False))
            return self._with_added(values)

    def finish(self) -> dict[str, Any]:
        """Note the end; returns the final contents."""
        with file_lock(self.folder / ".lock"):
            _READ.pop(self.added, None)  # once more from the file
            values = self._with_added(self._read()) | {"finished": now_iso()}
            self._write(values)
        return values

    def read(self) -> dict[str, Any] | None:
        """Return the contents, None for a sweep that has not started."""
        return self._with_added(self._read()) if self.path.exists() else None

    def is_running(self) -> bool:
        """Return whether the process that began it still works on it."""
        values = self.read()
        return values is not None and _is_running(values)

    def _write(self, values: dict[str, Any]) -> None:
        write_json(self.path, values)
        self.added.unlink(missing_ok=True)
        _READ.pop(self.added, None)

    def _with_added(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return the contents with what was added since; of a number that was added twice, the last one."""
        added = lines_of(self.added, values.get("token", values["started"]))
        jobs = {job["number"]: job for job in [*values["jobs"], *added]}
        return values | {"jobs": [jobs[number] for number in sorted(jobs)]}

    def _read(self) -> dict[str, Any]:
        unknown: dict[str, Any] = {"command": [], "notes": None, "total": None, "finished": None, "jobs": []}
        return read_json(self.path) or {"name": self.name, "started": now_iso(), **unknown}


_READ: dict[Path, tuple[str, int, list[dict[str, Any]]]] = {}  # file -> its version, bytes read before, what they hold


def lines_of(path: Path, version: str) -> list[dict[str, Any]]:
    """Return the objects in a file of JSON lines; of a version that was read before, only what is new is read.

    A line that was cut off, by a full disk or a killed process, holds nothing.
    """
    try:
        with path.open("rb") as stream:
            known, offset, jobs = _READ.get(path, (version, 0, []))
            if known != version or os.fstat(stream.fileno()).st_size < offset:
                offset, jobs = 0, []
            stream.seek(offset)
            data = stream.read()
    except FileNotFoundError:
        _READ.pop(path, None)
        return []
    except OSError as error:
        raise disk_error(path, error) from error
    whole = data[: data.rfind(b"\n") + 1]
    for line in whole.splitlines():
        with suppress(ValueError):
            jobs.append(json.loads(line))
    _READ[path] = (version, offset + len(whole), jobs)
    return jobs


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


def jobs_left(values: Mapping[str, Any] | None) -> int | None:
    """Return how many experiments of a sweep have not ended; None outside of one, or if their number is not known."""
    return max(values["total"] - len(values["jobs"]), 0) if values and values.get("total") else None


def _is_running(values: Mapping[str, Any]) -> bool:
    pid = values.get("pid")
    if values.get("finished") or pid in (None, os.getpid()):
        return False
    return is_alive(int(pid), values["started"], values.get("ticks"))
