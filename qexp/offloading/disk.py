"""Weights that rest on disk: one file for each group, in a folder that belongs to one offloaded model of one process.

A file is the group's flat memory, byte for byte. It is read with `preadv` straight into a reused buffer: where a thread
reads ahead, past the page cache (O_DIRECT), which costs a fraction of the CPU time and leaves nothing behind; else, and
on file systems that cannot, through the page cache, which is dropped behind it, as it is on writing. So offloading to
disk really lowers what the machine holds.
`flat` is a mapping of the same file: it stands in for the weights at rest (shape, dtype, `state_dict()`), costs no
memory until somebody looks at the values, and is not used for running the model.

Two models never mix: each store makes a folder of its own, and each file's name carries the SHA-256 of its content,
which is compared with what is read the first time, and again whenever the file's inode, size or time changed.

A store removes its folder on `remove()` and on exit. After a kill the folder stays behind; but its `owner.lock` was
held with `flock`, which the kernel gives up for the dead: so the next store in the same place can tell, and removes it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import mmap
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from qexp.errors import DiskError
from qexp.offloading.group import Pieces

log = logging.getLogger(__name__)

PAGE = 4096  # what O_DIRECT wants memory, offsets and lengths to be multiples of, on every usual disk
PREFIX = "offload-"
OWNER = "owner.lock"


class DiskStore:
    """A folder of weight files, private to one offloaded model."""

    def __init__(self, parent: Path, payload_bytes: int, *, direct: bool = False) -> None:
        """direct: read past the page cache, where the file system can.

        Raises: DiskError if the place is not writable or has no room for the payload.
        """
        created = not parent.exists()
        with _named(parent, "create a folder for offloaded weights"):
            parent.mkdir(parents=True, exist_ok=True)
            remove_stale_folders(parent)
            self.folder, owner = _create_locked_folder(parent)
        self._finalizer = weakref.finalize(self, _remove_folder, self.folder, owner, os.getpid(), created)
        free = shutil.disk_usage(self.folder).free
        if free < payload_bytes:
            self.remove()
            raise DiskError(
                f"offload.to=disk needs {_readable(payload_bytes)} for the weights, but '{parent}' has "
                f"{_readable(free)} free; free some space, set paths.outputs to another disk, or use offload.to=cpu"
            )
        self._written = 0
        self._direct = direct and _reads_directly(self.folder)

    def write(self, name: str, nbytes: int, pieces: Pieces) -> WeightFile:
        """Write one group. Raises DiskError, without leaving a partial file."""
        draft = self.folder / f"{self._written:04d}.part"
        digest = hashlib.sha256()
        with _named(draft, f"write the weights of '{name}'"):
            try:
                with _opened(draft, os.O_CREAT | os.O_RDWR | os.O_TRUNC) as handle:
                    if nbytes:
                        os.posix_fallocate(handle, 0, nbytes)  # a full disk is found here, not in the middle
                    for chunk in _stream(pieces, nbytes):
                        digest.update(chunk)
                        _write_chunk(handle, chunk)
                    os.fdatasync(handle)  # dirty pages cannot be dropped
                    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
                path = self.folder / f"{self._written:04d}-{digest.hexdigest()[:16]}.bin"
                draft.rename(path)
            except OSError:
                draft.unlink(missing_ok=True)
                raise
        self._written += 1
        return WeightFile(path, name, nbytes, digest.digest(), direct=self._direct)

    def remove(self) -> None:
        self._finalizer()


class WeightFile:
    """One group at rest on disk."""

    in_memory = False

    def __init__(self, path: Path, name: str, nbytes: int, digest: bytes, *, direct: bool = False) -> None:
        self.path, self.name, self.nbytes, self.digest, self.direct = path, name, nbytes, digest, direct
        self._verified: tuple[int, int, int] | None = None  # inode, size and time of the file that had the digest
        self.flat = torch.empty(0, dtype=torch.uint8)
        if nbytes:
            self.flat = torch.from_file(str(path), shared=True, size=nbytes, dtype=torch.uint8)

    def load_into(self, target: Tensor, staging: Callable[[int], Tensor], *, non_blocking: bool) -> None:
        """Read the group into `target` [nbytes]; on its way to a device it rests in `staging(nbytes)`."""
        if target.device.type == "cpu":
            self.read(target)
            return
        buffer = staging(self.nbytes)
        self.read(buffer)
        target.copy_(buffer, non_blocking=non_blocking)

    def expect(self) -> None:
        """Start reading ahead in the system. `read` reports errors of the file."""
        with suppress(OSError), _opened(self.path, os.O_RDONLY) as handle:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_WILLNEED)

    def read(self, buffer: Tensor) -> None:
        """Fill a uint8 host buffer [nbytes]; directly if it starts at a page.

        Raises: DiskError if the file is gone, shorter or has other content.
        """
        direct = self.direct and buffer.data_ptr() % PAGE == 0
        view = buffer.numpy().data
        flags = os.O_RDONLY | (os.O_DIRECT if direct else 0)
        with _named(self.path, f"read the weights of '{self.name}'"), _opened(self.path, flags) as handle:
            stat = os.fstat(handle)
            if direct:
                _read_directly(handle, view)
            else:
                _fill_from_file(handle, view)
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        self._verify(view, (stat.st_ino, stat.st_size, stat.st_mtime_ns))

    def _verify(self, content: memoryview, identity: tuple[int, int, int]) -> None:
        if identity == self._verified:
            return
        found = hashlib.sha256(content).digest()
        if found != self.digest:
            raise DiskError(
                f"'{self.path}' no longer holds the weights of '{self.name}': its SHA-256 is {found.hex()[:16]} "
                f"instead of {self.digest.hex()[:16]}; another process wrote there. Use a separate paths.outputs"
            )
        self._verified = identity

    def close(self) -> None:
        self.path.unlink(missing_ok=True)


def _fill_from_file(handle: int, view: memoryview, done: int = 0) -> None:
    """Fill a buffer from a file's beginning. done: bytes that are there already."""
    while done < len(view):
        got = os.preadv(handle, [view[done:]], done)
        if got == 0:
            raise OSError(errno.EIO, f"the file ends after {done} of {len(view)} bytes")
        done += got


def _read_directly(handle: int, view: memoryview) -> None:
    """Fill a buffer that starts at a page, from a file opened with O_DIRECT.

    Lengths must be multiples of a page, the buffer's may be none: so its last bytes come by a page in between.
    """
    done, whole = 0, len(view) // PAGE * PAGE
    with mmap.mmap(-1, PAGE) as page, memoryview(page) as last:
        while done < len(view):
            got = os.preadv(handle, [view[done:whole], last][done == whole :], done)
            done += got
            if done < len(view) and (got == 0 or done % PAGE):
                raise OSError(errno.EIO, f"the file ends after {done} of {len(view)} bytes")
        view[whole:] = last[: len(view) - whole]


def _reads_directly(folder: Path) -> bool:
    """Return whether files in a folder can be read past the page cache, found by trying."""
    probe = folder / "probe.part"
    try:
        probe.write_bytes(bytes(PAGE))
        with _opened(probe, os.O_RDONLY | os.O_DIRECT) as handle, mmap.mmap(-1, PAGE) as page:
            return os.preadv(handle, [page], 0) == PAGE
    except OSError as error:
        log.info("offload: '%s' is read through the page cache, not past it (O_DIRECT): %s", folder, error.strerror)
        return False
    finally:
        probe.unlink(missing_ok=True)


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    handle = os.open(path, flags)
    try:
        yield handle
    finally:
        os.close(handle)


def _readable(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**27 else f"{nbytes / 2**20:.2f} MiB"


def _create_locked_folder(parent: Path) -> tuple[Path, int]:
    """Create a folder and its lock. It is renamed when it is locked, so an unlocked folder of that name is stale."""
    draft = Path(tempfile.mkdtemp(prefix=".new-", dir=parent))
    owner = os.open(draft / OWNER, os.O_CREAT | os.O_RDWR)
    fcntl.flock(owner, fcntl.LOCK_EX)
    return draft.rename(parent / f"{PREFIX}{draft.name.removeprefix('.new-')}"), owner


def remove_stale_folders(parent: Path) -> None:
    """Remove the folders of killed processes."""
    for folder in parent.glob(f"{PREFIX}*"):
        # without a lock it is being removed, or whoever did that was killed; of one that is locked, the owner lives
        with suppress(BlockingIOError):
            with suppress(FileNotFoundError), _opened(folder / OWNER, os.O_RDWR) as handle:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)


def _remove_folder(folder: Path, owner: int, process: int, with_parent: bool) -> None:
    if os.getpid() == process:  # a forked child inherits the finalizer, not the folder
        shutil.rmtree(folder, ignore_errors=True)
        if with_parent:
            with suppress(OSError):  # it is shared with another store by now
                folder.parent.rmdir()
    os.close(owner)


def _stream(pieces: Pieces, nbytes: int) -> Iterator[memoryview]:
    """Yield the flat memory from start to end, a leaf or a gap at a time."""
    position = 0
    for offset, piece in pieces:
        yield memoryview(bytes(offset - position))
        yield piece.cpu().numpy().data
        position = offset + piece.numel()
    yield memoryview(bytes(nbytes - position))


def _write_chunk(handle: int, chunk: memoryview) -> None:
    while len(chunk):
        chunk = chunk[os.write(handle, chunk) :]


@contextmanager
def _named(path: Path, action: str) -> Iterator[None]:
    """Convert an OSError to a DiskError with the action, the place and the remedy."""
    try:
        yield
    except DiskError:
        raise
    except OSError as error:
        remedy = "free some space" if error.errno == errno.ENOSPC else "check that the place exists and is writable"
        if error.errno == errno.EIO or isinstance(error, FileNotFoundError):
            remedy = "check the disk, and that nothing else removes or writes files there"
        raise DiskError(
            f"offload.to=disk could not {action} at '{path}': {error.strerror or error}; {remedy}, "
            "set paths.outputs to another disk or use offload.to=cpu"
        ) from error
