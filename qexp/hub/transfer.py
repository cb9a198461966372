"""Files of a hub's repository into huggingface_hub's cache, each going on where an earlier try broke off.

The cache's layout is the library's: a file's content is blobs/<etag>, the sha256 of a large file, git's hash of a small
one; snapshots/<commit>/<path> is a link to it. The library itself throws a part of a file away when a download ends
early; here it stays as blobs/<etag>.part, and the next request asks for what is missing (HTTP Range). A file gets its
name once its content has been seen to have its hash. Several processes take turns at a file.

The price is one plain connection a file, instead of Xet's many: CONNECTIONS files at a time make up for it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from threading import Event, Lock
from typing import IO, Any

from qexp.errors import HubError
from qexp.system.files import file_lock
from qexp.system.progress import Progress

CONNECTIONS = 4
TIMEOUT_SECONDS = 5.0  # to connect, and between two packets
TRIES = 3  # in a row that bring nothing

Advance = Callable[[int, int], None]  # bytes, and files, that are there now


@dataclass(frozen=True)
class HubFile:
    """A file of a repository. etag: the sha256 of its content if it is large, else git's hash (sha1) of it."""

    name: str
    nbytes: int
    etag: str
    url: str

    def digest(self, stream: BufferedReader) -> str:
        """The hash of content, of the kind that `etag` is."""
        if len(self.etag) == 64:
            return hashlib.file_digest(stream, "sha256").hexdigest()
        return hashlib.file_digest(stream, lambda: hashlib.sha1(f"blob {self.nbytes}\0".encode())).hexdigest()


def transfer(files: Sequence[HubFile], storage: Path, commit: str, title: str) -> None:
    """Bring files into the folder `storage` of a repository in the cache, as parts of the snapshot of `commit`.

    Raises: HubError for content that is not what it should be, OSError, errors of the HTTP client.
    """
    missing = [file for file in files if not (storage / "snapshots" / commit / file.name).exists()]
    progress = Progress(title, len(missing), sum(file.nbytes for file in missing), unit="files")
    lock, stop = Lock(), Event()

    def advance(nbytes: int, items: int) -> None:
        with lock:
            progress.advance(nbytes, items)

    def bring(file: HubFile) -> None:
        blob = storage / "blobs" / file.etag
        with file_lock(storage.parent / ".locks" / storage.name / f"{file.etag}.lock"):
            if not blob.exists():
                _download(file, blob, advance, stop)
        _link(blob, storage / "snapshots" / commit / file.name)
        advance(0, 1)

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        futures = [pool.submit(bring, file) for file in missing]
        try:
            for future in futures:
                future.result()
        finally:
            stop.set()  # a thread sees it at its next packet
            pool.shutdown(cancel_futures=True)
    progress.close()


def _download(file: HubFile, blob: Path, advance: Advance, stop: Event) -> None:
    """One file, in as many requests as it takes."""
    blob.parent.mkdir(parents=True, exist_ok=True)
    part = blob.with_name(f"{blob.name}.part")
    with part.open("ab") as stream:
        begin = stream.tell()
        advance(begin, 0)
        _append_rest(file, stream, advance, stop)
    nbytes = part.stat().st_size
    if nbytes < file.nbytes:  # told to stop
        return
    with part.open("rb") as content:
        if nbytes == file.nbytes and file.digest(content) == file.etag:
            part.replace(blob)
            return
    part.unlink()
    if not begin:
        raise HubError(f"{file.name} arrived damaged: its content is not what the hub lists")
    advance(-nbytes, 0)
    _download(file, blob, advance, stop)  # all of it, if what an earlier try left may have been damaged


def _append_rest(file: HubFile, stream: IO[bytes], advance: Advance, stop: Event) -> None:
    """Request what is missing until it is there, or nothing more comes. Raises: HubError."""
    import httpx2

    idle = 0  # requests in a row that brought nothing
    while stream.tell() < file.nbytes and not stop.is_set():
        before, lost = stream.tell(), None
        try:
            _request(file, stream, advance, stop)
        except httpx2.TransportError as error:
            lost = error
        idle = 0 if stream.tell() > before else idle + 1
        if idle == TRIES:
            what = f"{type(lost).__name__}: {lost}" if lost else "it ended early"
            raise HubError(f"the download of {file.name} broke off ({what})") from lost
        stop.wait(idle)


def _request(file: HubFile, stream: IO[bytes], advance: Advance, stop: Event) -> None:
    """Append what is missing of a file; all of it if the server ignores where to begin."""
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    begin = stream.tell()
    headers = {**build_hf_headers(), "Accept-Encoding": "identity", "Range": f"bytes={begin}-"}
    options: dict[str, Any] = {"headers": headers, "timeout": TIMEOUT_SECONDS, "follow_redirects": True}
    with get_session().stream("GET", file.url, **options) as response:
        hf_raise_for_status(response)
        if response.status_code == 200 and begin:
            advance(-begin, 0)
            stream.seek(0)
            stream.truncate()
        for chunk in response.iter_raw():  # as they come: pieces of a size would be lost with the connection
            stream.write(chunk)
            advance(len(chunk), 0)
            if stop.is_set():
                return
        stream.flush()


def _link(blob: Path, pointer: Path) -> None:
    """Make `pointer` a relative link to `blob`, so that the cache can be moved."""
    pointer.parent.mkdir(parents=True, exist_ok=True)
    new = pointer.with_name(f".{pointer.name}.{os.getpid()}")
    new.unlink(missing_ok=True)
    new.symlink_to(os.path.relpath(blob, pointer.parent))
    new.replace(pointer)
