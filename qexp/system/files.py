"""Files on disk, each whole or absent, and locks between processes.

A file is written beside its final name, synced and renamed; a crash, a kill or a full disk leaves the old file or none.
A lock is an flock, which the kernel releases when its owner dies, however it dies.
"""

from __future__ import annotations

import csv
import errno
import fcntl
import io
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, TypeVar

import yaml

from qexp.errors import DamagedFileError, DiskError

LOCK_POLL_SECONDS = 0.1
Parsed = TypeVar("Parsed")


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


def user_cache() -> Path:
    """Return the folder of this program in the user's cache (XDG Base Directory Specification).

    Raises: OSError for a user without a home.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "qexp"
    except RuntimeError as error:
        raise OSError(str(error)) from None


def write_bytes(path: Path, data: bytes) -> None:
    with replacing(path) as beside:
        beside.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Raise ValueError for NaN or infinity, which JSON cannot hold."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def to_csv(columns: Sequence[str], rows: Sequence[Mapping[str, object]]) -> str:
    """CSV text with a header; None is an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a file, None if there is no file.

    Raises DamagedFileError if it holds something else, DiskError.
    """
    return _read_mapping(path, json.loads, "a JSON object")


def read_csv(path: Path) -> list[dict[str, Any]] | None:
    """Return the rows of a file with a header, None if there is no file. Raises DamagedFileError, DiskError."""
    return _read_parsed(path, lambda data: list(csv.DictReader(io.StringIO(data.decode(), newline=""))))


def _read_parsed(path: Path, parse: Callable[[bytes], Parsed]) -> Parsed | None:
    """Return the parsed contents of a file, None if there is no file."""
    try:
        return parse(path.read_bytes())
    except FileNotFoundError:
        return None
    except IsADirectoryError as error:
        raise DamagedFileError(path, "it is a folder") from error
    except OSError as error:
        raise DiskError(f"{path}: cannot be read ({error.strerror}); make it readable, or delete it") from error
    except (ValueError, RecursionError, csv.Error, yaml.YAMLError) as error:
        raise DamagedFileError(path, " ".join(str(error).split())) from error


def _read_mapping(path: Path, parse: Callable[[bytes], Any], kind: str) -> dict[str, Any] | None:
    def mapping(data: bytes) -> dict[str, Any]:
        if not isinstance(value := parse(data), dict):
            raise ValueError(f"it must hold {kind}")
        return value

    return _read_parsed(path, mapping)


def append_line(path: Path, line: str) -> None:
    """Add a line to a file, after the end of one that was cut off. Raises DiskError."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        with os.fdopen(descriptor, "ab+") as stream:
            if stream.seek(0, os.SEEK_END) and (stream.seek(-1, os.SEEK_END), stream.read(1))[1] != b"\n":
                line = f"\n{line}"
            stream.write(f"{line}\n".encode())
    except OSError as error:
        raise disk_error(path, error) from error


@contextmanager
def file_lock(
    path: Path, waiting: Callable[[], None] = lambda: None, patience_seconds: float = math.inf
) -> Iterator[None]:
    """Hold an exclusive lock on `path`, across processes and threads; `waiting` is called once if it is taken.

    Raises: TimeoutError if it is taken for so long, DiskError.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise disk_error(path, error) from error
    try:
        try:
            _lock_now(descriptor)
        except BlockingIOError:
            waiting()
            _wait_for_lock(descriptor, patience_seconds)
        yield
    finally:
        os.close(descriptor)


def _lock_now(descriptor: int) -> None:
    """Raise BlockingIOError if somebody has it."""
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _wait_for_lock(descriptor: int, patience_seconds: float) -> None:
    if patience_seconds == math.inf:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return
    deadline = time.monotonic() + patience_seconds
    while True:  # the call itself knows no time limit
        try:
            _lock_now(descriptor)
            return
        except BlockingIOError:
            if (left := deadline - time.monotonic()) <= 0:
                raise TimeoutError from None
            time.sleep(min(left, LOCK_POLL_SECONDS))


def disk_error(path: Path, error: OSError, option: str = "paths.outputs=") -> DiskError:
    """Return the same failure with place and remedy. option: what names another place for it."""
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


def to_yaml(value: Any, width: int = 80) -> str:
    """Return YAML text, entries in their order; by libyaml, where Python's yaml has it: ten times as fast."""
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    return yaml.dump(value, Dumper=dumper, sort_keys=False, allow_unicode=True, width=width)


def read_yaml(path: Path) -> dict[str, Any] | None:
    """Return the mapping in a file, None if there is no file.

    Raises: DamagedFileError if it holds something else, DiskError if it cannot be read.
    """
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return _read_mapping(path, lambda data: yaml.load(data.decode(), Loader=loader), "a configuration")
