"""The folder of one experiment: its status, its results, its lock.

A folder is guarded by an flock on its `.lock`, which the kernel releases when its owner dies, however it dies.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from qexp.config.dataclass_io import field_types
from qexp.errors import DamagedFileError, DiskError, WaitedTooLongError
from qexp.system.child_process import kill_marked
from qexp.system.files import disk_error, file_lock, read_json, write_json, write_text

LOCK = ".lock"
DAMAGED = "damaged"  # files that were not what a run had written
PARTIAL = "partial.jsonl"  # what a run that was killed had found by then
KEPT = (LOCK, "wandb", DAMAGED, PARTIAL)  # what a new attempt leaves in the folder; W&B appends to its own files
SAVED = "saved.json"  # the files that the model of an experiment was saved as
PUSHED = "hub.json"  # where on a hub the model of an experiment is
BESIDE = "beside.json"  # the processes that took most CPU time beside a run
LOAD_MEMORY = "load_memory.csv"  # host memory of the process while weights were loaded
SCRATCH = "offload"  # where an experiment offloads weights to disk


@dataclass(frozen=True)
class Status:
    """status.json. status: running, done, failed or unsupported; reason: of the last two, see `results/outcome.py`;
    ticks: when the process that is running began, see `start_ticks`; sweep: of a reference, the token of the sweep that
    ran it, see `Manifest.start`."""

    status: str
    pid: int
    started: str
    reason: str | None = None
    message: str = ""
    finished: str | None = None
    seconds: float = 0.0
    ticks: int | None = None
    sweep: str | None = None


STATUSES = ("running", "done", "failed", "unsupported")
STATUS_FIELDS = {**field_types(Status), "seconds": int | float}
_DEFAULTS = {item.name: item.default for item in fields(Status)}


class RunFolder:
    """One experiment's folder, `outputs/runs/<key>` or `outputs/references/<key>`; it need not exist yet."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def key(self) -> str:
        return self.path.name

    def read_status(self) -> Status | None:
        """Return the stored status; one that is `running` although its process is gone reads as failed.

        Raises: DamagedFileError, DiskError.
        """
        path = self.path / "status.json"
        if (values := read_json(path)) is None:
            return None
        status = _status_of(path, values)
        if status.status == "running" and not is_alive(status.pid, status.started, status.ticks):
            gone = f"process {status.pid} is gone without a result: it was killed, or the machine restarted"
            return replace(status, status="failed", reason="signal", message=gone)
        return status

    def read_result(self) -> dict[str, Any] | None:
        return read_json(self.path / "result.json")

    def holds(self, *names: str) -> bool:
        """Return whether all these files are there."""
        return all((self.path / name).is_file() for name in names)

    def write_status(self, status: Status) -> None:
        self.write_json("status.json", asdict(status))

    def write_json(self, name: str, value: Any) -> None:
        write_json(self.path / name, value)

    def write_text(self, name: str, text: str) -> None:
        write_text(self.path / name, text)

    @contextmanager
    def locked(self, waiting: Callable[[str], None], timeout_minutes: float | None = None) -> Iterator[None]:
        """Hold this folder alone. `waiting(message)` is called once if another process has it.

        Raises: WaitedTooLongError once it has it for so long; None waits as long as it takes.
        """
        message = f"{self.path} is being run by another process; waiting for it to finish"
        patience = math.inf if timeout_minutes is None else 60 * timeout_minutes
        with ExitStack() as stack:
            try:
                stack.enter_context(file_lock(self.path / LOCK, lambda: waiting(message), patience))
            except TimeoutError as error:
                raise WaitedTooLongError(
                    f"{self.path} was run by another process for all of isolation.timeout_minutes={timeout_minutes:g}; "
                    "run this again once that has finished, or raise it (null waits as long as it takes)"
                ) from error
            yield

    def clear(self) -> None:
        """Remove what an earlier attempt left; the status first: what it stands for is about to go."""
        try:
            (self.path / "status.json").unlink(missing_ok=True)
            for entry in self.path.iterdir():
                if entry.name not in KEPT:
                    _remove(entry)
        except OSError as error:
            raise disk_error(self.path, error) from error

    def remove_scratch(self) -> None:
        """Remove offloaded weights, and files that a killed process was still writing (names with a leading dot)."""
        with suppress(OSError):  # tidying up: what cannot be removed now goes with the next `clear`
            for entry in [self.path / SCRATCH, *self.path.rglob(".*")]:
                if entry.name != LOCK and "wandb" not in entry.relative_to(self.path).parts:
                    _remove(entry)


def remove_leftovers(outputs: Path) -> None:
    """Remove offloaded weights of runs that were killed, and end processes that they started: of all run folders that
    no process holds."""
    kill_marked(partial(_is_left, outputs.absolute()))
    for scratch in [*outputs.glob(f"runs/*/{SCRATCH}"), *outputs.glob(f"references/*/{SCRATCH}")]:
        with try_lock(scratch.parent) as is_free:
            if is_free:
                RunFolder(scratch.parent).remove_scratch()


def _is_left(outputs: Path, folder: str) -> bool:
    """Return whether a run folder, '' for none, is in `outputs` and held by nobody."""
    path = Path(folder)
    if not folder or path.parent.parent != outputs:
        return False
    with try_lock(path if path.is_dir() else None) as is_free:
        return is_free


@contextmanager
def try_lock(folder: Path | None) -> Iterator[bool]:
    """Hold a run folder alone, as `locked` does, without waiting: whether it is. None is always free."""
    with ExitStack() as stack:
        is_free = folder is None
        if folder is not None:
            with suppress(TimeoutError, DiskError):
                stack.enter_context(file_lock(folder / LOCK, patience_seconds=0))
                is_free = True
        yield is_free


def _status_of(path: Path, values: dict[str, Any]) -> Status:
    """Raise DamagedFileError for what is no status."""
    known = {key: value for key, value in values.items() if key in STATUS_FIELDS}
    wrong = [key for key, kind in STATUS_FIELDS.items() if not isinstance(known.get(key, _DEFAULTS.get(key)), kind)]
    if not wrong and known["status"] not in STATUSES:
        wrong = ["status"]
    for name in ("started", "finished"):
        try:
            datetime.fromisoformat(known.get(name) or now_iso())
        except (TypeError, ValueError):
            wrong.append(name)
    if wrong:
        raise DamagedFileError(path, f"{', '.join(dict.fromkeys(wrong))} is missing or wrong")
    return Status(**known)


def now_iso() -> str:
    """UTC, in a form that sorts as text."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def start_ticks(pid: int) -> int | None:
    """Return when a process began, in clock ticks since the machine did; None if it is gone, or not on Linux.

    With its number, this names a process, whatever the clock is set to. Source: proc_pid_stat(5), field 22.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        return int(stat.rpartition(")")[2].split()[19])  # the name before may hold spaces and parentheses
    except (OSError, ValueError, IndexError):
        return None


def is_alive(pid: int, started: str, ticks: int | None = None) -> bool:
    """Return whether the process that wrote `pid` at time `started` still runs, and is not a later one with its number.

    ticks: its `start_ticks`; None compares the time, for what was written where there are none.
    """
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        if ticks is not None:
            return start_ticks(pid) == ticks
        return process.create_time() <= datetime.fromisoformat(started).timestamp() + 1
    except psutil.NoSuchProcess:
        return False


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink(missing_ok=True)
