"""Compute a digest of a file's content: equal for a copy, different for a fine-tune of the same size and date.

Up to FULL_BYTES it is the sha256 of all bytes. Reading a larger checkpoint would take longer than some experiments, so
only its header and samples of every tensor are hashed: PLACES places per tensor, at least SAMPLES_BYTES in total.
Fine-tunes differ in nearly every value of the tensors that they train, so samples distinguish them; `identity=full`
hashes everything. A hub's cache names large files by their sha256, which is used unchanged.

Digests are cached by the file's state, in this process and in the user's cache folder (`file_facts.py`), so that a file
is read once.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from io import BufferedReader
from pathlib import Path

from qexp.checkpoints.file_facts import is_settled, recall_fact, remember_fact
from qexp.checkpoints.regular_file import FileState, open_regular
from qexp.checkpoints.tensor_entry import FileHeader, TensorEntry

FULL_BYTES = 256 << 20
PLACES = 4  # of samples in a tensor: its begin, its end, and evenly between
PLACE_BYTES = 4 << 10
SAMPLES_BYTES = 64 << 20  # of all samples of a file together, at least
SHA256 = re.compile("[0-9a-f]{64}")
VERSION = 1  # of how samples are taken


_digests: dict[tuple[FileState, bool], str] = {}


def content_digest(file: Path, *, full: bool = False, header: Callable[[Path], FileHeader] | None = None) -> str:
    """Return the digest of a file's content.

    full: read a large file completely. header: parses a checkpoint's header; without it the file is read completely.
    Raises: LoadError if it cannot be read.
    """
    stored = file.resolve()
    if stored.parent.name == "blobs" and SHA256.fullmatch(stored.name):
        return stored.name
    with open_regular(file) as (stream, state):
        sampled = header if state.size > FULL_BYTES and not full else None
        is_sampled = sampled is not None
        known = _recall(state, is_sampled)
        if known is not None:
            return known
        started = time.time_ns()
        if sampled is not None:
            digest = _sampled_digest(stream, state.size, sampled(file))
        else:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if is_settled(state, started):
            _remember(state, is_sampled, digest)
        return digest


def _sampled_digest(stream: BufferedReader, size: int, header: FileHeader) -> str:
    digest = hashlib.sha256(f"samples {VERSION} {size} {header.nbytes}".encode())
    stream.seek(0)
    digest.update(stream.read(header.nbytes))
    for start, nbytes in _sample_ranges(header.entries):
        stream.seek(start)
        digest.update(stream.read(nbytes))
    return "samples-" + digest.hexdigest()


def _sample_ranges(entries: Sequence[TensorEntry]) -> Iterator[tuple[int, int]]:
    """(offset, bytes) of the samples, in the order of the file."""
    sizes, nbytes = [entry.nbytes for entry in entries], PLACE_BYTES
    while sum(min(size, PLACES * nbytes) for size in sizes) < min(SAMPLES_BYTES, sum(sizes)):
        nbytes *= 2
    for entry in sorted(entries, key=lambda entry: entry.offset):
        if entry.nbytes <= PLACES * nbytes:
            yield entry.offset, entry.nbytes
        else:
            last = entry.nbytes - nbytes
            yield from ((entry.offset + last * place // (PLACES - 1), nbytes) for place in range(PLACES))


def _recall(state: FileState, is_sampled: bool) -> str | None:
    if (state, is_sampled) not in _digests:
        text = recall_fact("digests", VERSION, state, is_sampled)
        if text is not None and SHA256.fullmatch(text.removeprefix("samples-")):
            _digests[state, is_sampled] = text
    return _digests.get((state, is_sampled))


def _remember(state: FileState, is_sampled: bool, digest: str) -> None:
    _digests[state, is_sampled] = digest
    remember_fact("digests", digest, VERSION, state, is_sampled)
