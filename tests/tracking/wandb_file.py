"""Read a .wandb file: a 7-byte header, then records in LevelDB's log format, each a protobuf `Record`."""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BLOCK = 32768
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass
class Logged:
    """What a run logged: its last summary, one dict per history row, files by name, its own fields in `run`."""

    run: Any = None
    exit_code: int | None = None
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    files: list[str] = field(default_factory=list)


def records(path: Path) -> Iterator[Any]:
    from wandb.proto import wandb_internal_pb2 as pb

    data, place, parts = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if BLOCK - place % BLOCK < 7:  # no room for a header: the rest of the block is padding
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        parts = (
            data[place + 7 : place + 7 + length]
            if kind in (FULL, FIRST)
            else parts + data[place + 7 : place + 7 + length]
        )
        place += 7 + length
        if kind in (FULL, LAST):
            yield pb.Record.FromString(parts)


def read_wandb(path: Path) -> Logged:
    logged = Logged()
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            logged.run = record.run
            logged.config |= items(record.run.config.update)
        elif kind == "config":
            logged.config |= items(record.config.update)
        elif kind == "summary":
            logged.summary |= items(record.summary.update)
        elif kind == "history":
            logged.history.append(items(record.history.item))
        elif kind == "files":
            logged.files += [file.path for file in record.files.files]
        elif kind == "exit":
            logged.exit_code = record.exit.exit_code
    return logged


def items(updates: Any) -> dict[str, Any]:
    """Keys are one name, or the path of a nested value."""
    result: dict[str, Any] = {}
    for update in updates:
        *parents, name = update.nested_key or [update.key]
        place = result
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = json.loads(update.value_json)
    return result
