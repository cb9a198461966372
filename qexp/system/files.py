"""Results on disk: every file whole or absent, every folder in the hands of one process at a time.

A file is written beside its final name, synced and renamed; a crash, a kill or a full disk leaves the old file or none.
A folder is guarded by an flock on its `.lock`, which the kernel releases when its owner dies, however it dies.
"""

from __future__ import annotations

import csv
import errno
import fcntl
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import psutil

from qexp.errors import DiskError

LOCK = ".lock"
KEPT = (LOCK, "wandb")  # what a new attempt leaves in the folder; W&B appends to its own files
PUSHED = "hub.json"  # where on a hub the model of an experiment is
SCRATCH = "offload"  # where an experiment offloads weights to disk


@dataclass(frozen=True)
class Status:
    """status.json. status: running, done, failed or unsupported; reason: of the last two, see `results/outcome.py`."""

    status: str
    pid: int
    started: str
    reason: str | None = None
    message: str = ""
    finished: str | None = None
    seconds: float = 0.0


class RunFolder:
    """One experiment's folder, `outputs/runs/<key>` or `outputs/references/<key>`; it need not exist yet."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def key(self) -> str:
        return self.path.name

    def read_status(self, name: str = "status.json") -> Status | None:
        """The stored status; one that is `running` although its process is gone reads as failed."""
        values = read_json(self.path / name)
        if values is None:
            return None
        known = {item.name for item in fields(Status)}
        status = Status(**{key: value for key, value in values.items() if key in known})
        if status.status == "running" and not is_alive(status.pid, status.started):
            gone = f"process {status.pid} is gone without a result: it was killed, or the machine restarted"
            return replace(status, status="failed", reason="signal", message=gone)
        return status

    def read_result(self) -> dict[str, Any] | None:
        return read_json(self.path / "result.json")

    def holds(self, *names: str) -> bool:
        """Whether all these files are there."""
        return all((self.path / name).is_file() for name in names)

    def write_status(self, status: Status, name: str = "status.json") -> None:
        self.write_json(name, asdict(status))

    def write_json(self, name: str, value: Any) -> None:
        write_json(self.path / name, value)

    def write_text(self, name: str, text: str) -> None:
        write_text(self.path / name, text)

    @contextmanager
    def locked(self, waiting: Callable[[str], None]) -> Iterator[None]:
        """Hold this folder alone. `waiting(message)` is called once if another process has it."""
        message = f"{self.path} is being run by another process; waiting for it to finish"
        with file_lock(self.path / LOCK, lambda: waiting(message)):
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


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to instead of `path`: synced and renamed onto it at the end, removed if anything goes wrong.

    Raises: DiskError for a disk that is full or not writable.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.touch()
        mode = beside.stat().st_mode & 0o777  # as the umask has it; some writers make files that only they can read
        yield beside
        beside.chmod(mode)
        with beside.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(beside, path)
    except DiskError:
        raise
    except OSError as error:
        raise disk_error(path, error) from error
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    with replacing(path) as beside:
        beside.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Raises ValueError for NaN or infinity, which JSON cannot hold."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def to_csv(columns: Sequence[str], rows: Sequence[Mapping[str, object]]) -> str:
    """CSV text with a header; None is an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file, None if there is no file. Raises DiskError if it holds something else."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DiskError(f"{path}: cannot be read ({error.strerror}); make it readable, or delete it") from error
    except ValueError as error:
        raise DiskError(f"{path}: is damaged ({error}); delete {path.parent} to start over") from error
    if not isinstance(value, dict):
        raise DiskError(f"{path}: must hold a JSON object; delete {path.parent} to start over")
    return value


@contextmanager
def file_lock(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold an exclusive lock on `path`, across processes and threads; `waiting` is called once if it is taken."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise disk_error(path, error) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def disk_error(path: Path, error: OSError, option: str = "paths.outputs=") -> DiskError:
    """The same failure with place and remedy. option: what names another place for it."""
    remedy = "check the disk"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = "free space there"
    elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        remedy = "make it writable"
    reason = error.strerror or str(error)
    return DiskError(f"{path}: cannot be written ({reason}); {remedy}, or choose another folder with {option}")


def check_writable(folder: Path, option: str) -> None:
    """Make a folder, if it is not there, and see that files can be made in it. Raises DiskError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise disk_error(folder, error, option) from error


def now_iso() -> str:
    """UTC, in a form that sorts as text."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def is_alive(pid: int, started: str) -> bool:
    """Whether the process that wrote `pid` at time `started` still runs, and is not a later one with its number."""
    try:
        process = psutil.Process(pid)
        born = process.create_time()
        return process.status() != psutil.STATUS_ZOMBIE and born <= datetime.fromisoformat(started).timestamp() + 1
    except psutil.NoSuchProcess:
        return False


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink(missing_ok=True)
