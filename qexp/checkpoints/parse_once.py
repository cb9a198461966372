"""Parse each file that describes a checkpoint (a header, a config.json, an index) once in a process.

A file is recognized by its state, which every write changes. A second write within the same clock tick would go
unnoticed, so a file written just before it was parsed is compared byte by byte.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from qexp.checkpoints.file_facts import is_settled
from qexp.checkpoints.regular_file import FileState, open_regular

Value = TypeVar("Value")
REMEMBERED_FILES = 1024  # more than any checkpoint has shards


class _Parsed(NamedTuple):
    state: FileState
    raw: bytes | None  # what was parsed, of a file that was fresh then
    value: Any


_parsed: dict[tuple[Path, Callable[..., Any]], _Parsed] = {}


def parse_once(file: Path, parse: Callable[[Path, BufferedReader, FileState], Value]) -> Value:
    """Return the parsed content of a file, from memory if the file has not changed since.

    Args:
        file: a regular file.
        parse: reads the stream from its start to the end of the parsed part; callers must not change its result.
    Raises: LoadError if the file cannot be read, and the errors of `parse`.
    """
    with open_regular(file) as (stream, state):
        known = _parsed.pop((file, parse), None)
        if known is None or known.state != state or known.raw not in (None, stream.read(len(known.raw or b""))):
            stream.seek(0)
            started = time.time_ns()
            value, end = parse(file, stream, state), stream.tell()
            stream.seek(0)
            known = _Parsed(state, None if is_settled(state, started) else stream.read(end), value)
        if len(_parsed) == REMEMBERED_FILES:
            del _parsed[next(iter(_parsed))]
        _parsed[file, parse] = known  # at the end: the least recently used come first
        return known.value
