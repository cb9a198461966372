"""A folder of weights that were quantized before, so that a second load of them costs a mapping.

Experiments of a sweep over offloading, tasks, seeds or prompts need the same quantized weights. An entry is a folder
named by a hash of everything that decides their bytes (`cache_key.py`):

    <key>/weights.safetensors   the weights, as their format stores them, aligned
    <key>/entry.json            what the load took that quantized them, and the state and digest of the file

An entry is made beside, and renamed when it is complete: of two processes that make the same one, the first wins.
A file whose state (inode, size, times) is not the recorded one is compared with its digest, and an entry that is
damaged is made again. What was used least recently goes first when the limit is reached; who has it mapped keeps its
pages.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from torch import Tensor, nn

from qexp.checkpoints.checkpoint import read_header
from qexp.checkpoints.regular_file import open_regular
from qexp.checkpoints.safetensors_file import write_safetensors
from qexp.errors import ConfigError, DamagedFileError, DiskError, LoadError
from qexp.loading.cache_key import KEY_DIGITS, cache_key
from qexp.loading.component import CacheFolder, Prepared
from qexp.loading.sharing import distinct_state
from qexp.loading.work_item import WorkItem
from qexp.quantizers.base import Quantizer, load_quantizer
from qexp.quantizers.rows import WeightSpec
from qexp.system.files import read_json, write_json
from qexp.system.memory import GIB
from qexp.system.screen import say

WEIGHTS, ENTRY = "weights.safetensors", "entry.json"
UNFINISHED = ".unfinished-"  # prefix of a folder that is being made, or removed
FREE_SHARE = 0.1  # of the free disk, which entries may take by default
SPARE_BYTES = 64 << 20  # of the disk, left free
KEY = re.compile(f"[0-9a-f]{{{KEY_DIGITS}}}")


class QuantizedCache:
    """The entries in a folder."""

    def __init__(self, settings: CacheFolder) -> None:
        self.folder, self._limit_gib, self._is_full = settings.path, settings.limit_gib, settings.is_full
        self.in_child = settings.in_child

    @staticmethod
    def can_hold(prepared: Prepared) -> bool:
        """Return whether a load quantizes, and to formats that are stored."""
        parts = [prepared.quantizer.part_of(layer) for layer in prepared.chosen]
        return bool(parts and not prepared.quantizer.stored) and all(
            part.is_serializable and not part.requires_calibration for part in parts
        )

    def find(self, prepared: Prepared) -> CachedWeights | None:
        """Return the weights of a load that was planned, None if they are not there, or damaged."""
        if not self.can_hold(prepared):
            return None
        folder = self.folder / cache_key(prepared, is_full=self._is_full)
        if not folder.is_dir():
            return None
        try:
            found = CachedWeights(folder, prepared)
        except (LoadError, DiskError, OSError, KeyError, TypeError) as error:
            is_damaged = _is_damage(error)
            state = "is damaged" if is_damaged else "cannot be read"
            say(f"{folder} {state} ({error}); its weights are quantized again")
            if is_damaged:
                discard(folder)
            return None
        with suppress(OSError):  # a folder that is read-only
            os.utime(folder / ENTRY)  # used now
        return found

    def add(self, prepared: Prepared, numbers: Mapping[str, float]) -> CachedWeights | None:
        """Make an entry of the weights of a loaded model. numbers: what its load took.

        Returns: None if there cannot be one, which is said once.
        """
        if not self.can_hold(prepared):
            return None
        try:
            tensors, metadata = _stored_form(prepared)
            folder = self.folder / cache_key(prepared, is_full=self._is_full)
            self._make_room(sum(tensor.nbytes for tensor in tensors.values()))
            self._write(folder, tensors, metadata, numbers)
            return CachedWeights(folder, prepared)
        except (_NoRoom, ConfigError, LoadError, OSError) as error:  # DiskError is an OSError
            self._say_once(f"{prepared.request.component}: quantized weights are not kept in {self.folder}: {error}")
            return None

    def _write(
        self, folder: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], numbers: Mapping[str, float]
    ) -> None:
        unfinished = Path(mkdtemp(prefix=f"{UNFINISHED}{os.getpid()}-", dir=self.folder))
        try:
            write_safetensors(unfinished / WEIGHTS, tensors, metadata)
            with open_regular(unfinished / WEIGHTS) as (stream, _):
                os.fsync(stream.fileno())
            write_json(unfinished / ENTRY, {"schema": 1, "numbers": dict(numbers), **_describe(unfinished / WEIGHTS)})
            with suppress(FileExistsError):
                try:
                    os.rename(unfinished, folder)
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # another process was first
                        raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    def _make_room(self, nbytes: int) -> None:
        """Remove what was used least recently, until so much may be added. Raises _NoRoom, OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        entries = {path: _size(path) for path in self._entries()}
        free = shutil.disk_usage(self.folder).free
        held = sum(entries.values())
        limit = int(FREE_SHARE * (free + held)) if self._limit_gib is None else int(self._limit_gib * GIB)
        if nbytes > limit:
            raise _NoRoom(f"they take {nbytes / GIB:.2f} GiB, and loader.cache_gib allows {limit / GIB:.2f}")
        for path in sorted(entries, key=_last_use):
            if held + nbytes <= limit and free >= nbytes + SPARE_BYTES:
                break
            discard(path)
            held, free = held - entries[path], free + entries[path]
        if free < nbytes + SPARE_BYTES:
            raise _NoRoom(f"they take {nbytes / GIB:.2f} GiB, and the disk has {free / GIB:.2f} left")

    def _entries(self) -> Iterator[Path]:
        for path in self.folder.iterdir():
            if path.name.startswith(UNFINISHED):
                if not _is_alive(path.name.removeprefix(UNFINISHED).partition("-")[0]):
                    shutil.rmtree(path, ignore_errors=True)
            elif KEY.fullmatch(path.name) and (path / ENTRY).is_file() and not path.is_symlink():
                yield path  # and nothing else: the folder may hold a user's own files

    def _say_once(self, message: str) -> None:
        """Say it once for all workers of one parent."""
        said = self.folder / ".said"
        text = f"{os.getppid()} {message}"
        with suppress(OSError):
            if said.exists() and text in said.read_text(encoding="utf-8").splitlines():
                return
            with said.open("a", encoding="utf-8") as stream:
                stream.write(f"{text}\n")
        say(message)


def _is_damage(error: Exception) -> bool:
    """Return whether an entry is wrong; if not, it is another user's, or the disk failed: not ours to remove."""
    if isinstance(error, OSError) and not isinstance(error, DamagedFileError):  # DiskError is an OSError
        return False
    reason = error.__context__
    return not isinstance(reason, OSError) or isinstance(reason, FileNotFoundError)


class CachedWeights:
    """The quantized weights of one load, from an entry. Raises LoadError, DiskError, KeyError if it is damaged."""

    def __init__(self, folder: Path, prepared: Prepared) -> None:
        self.folder = folder
        values = read_json(folder / ENTRY)
        if values is None:
            raise LoadError(f"'{folder / ENTRY}' is not there")
        _check_unchanged(folder, values)
        self.numbers: dict[str, float] = values["numbers"]
        header = read_header(folder / WEIGHTS)
        self._entries = {entry.name: entry for entry in header.entries}
        self._readers = _Readers(prepared.quantizer, header.metadata, prepared.request.device)
        self._stored = {
            item.target: self._stored_item(item) for item in prepared.plan.distinct if item.spec is not None
        }

    def _stored_item(self, item: WorkItem) -> WorkItem:
        assert item.spec is not None
        reader = self._readers.part_of(item.spec.module)
        parts = reader.stored_parts(item.spec.module, self._entries)
        if parts is None:
            raise LoadError(f"it lacks '{item.spec.module}'")
        reader.check_quantized_param_shape(item.spec, parts)
        (_, first), *others = parts.items()
        return replace(item, source=first, stored=True, companions=dict(others), read="in_place")

    def in_place_of(self, prepared: Prepared, *, alone: bool = False) -> Prepared:
        """Return what was prepared, with these weights in place of those to quantize. alone: and nothing else."""
        items = [self._stored.get(item.target, item) for item in prepared.plan.items]
        kept = [item for item in items if item.target in self._stored] if alone else items
        plan = replace(prepared.plan, items=tuple(sorted(kept, key=WorkItem.place)))
        return replace(prepared, plan=plan, quantizer=self._readers)


class _Readers(Quantizer):
    """Assembles weights from their stored form, each by a quantizer of its format."""

    def __init__(self, quantizer: Quantizer, metadata: Mapping[str, str], device: torch.device) -> None:
        super().__init__(quantizer.config)
        self._of, self._made = quantizer, dict[int, Quantizer]()
        self._metadata, self._device = metadata, device

    def part_of(self, layer: str) -> Quantizer:
        """Return the quantizer that reads a layer's weight."""
        part = self._of.part_of(layer)
        if id(part) not in self._made:
            reader = load_quantizer(part.config)
            reader.mark_stored(self._metadata)
            reader.validate_environment(self._device)
            self._made[id(part)] = reader
        return self._made[id(part)]

    def create_quantized_param(
        self, spec: WeightSpec, sources: Any, companions: Mapping[str, Tensor], device: torch.device
    ) -> nn.Parameter:
        return self.part_of(spec.module).create_quantized_param(spec, sources, companions, device)

    def stored_alignment(self, spec: WeightSpec) -> int:
        return self.part_of(spec.module).stored_alignment(spec)


class _NoRoom(Exception):
    """There is no room for an entry."""


def discard(folder: Path) -> None:
    """Remove an entry: at once for whoever looks for it."""
    gone = folder.with_name(f"{UNFINISHED}{os.getpid()}-{folder.name}")
    with suppress(OSError):
        os.rename(folder, gone)
    shutil.rmtree(gone, ignore_errors=True)


def _stored_form(prepared: Prepared) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the quantized weights of a loaded model as their formats store them. Raises ConfigError."""
    state = distinct_state(prepared.model, prepared.quantizer)
    tensors, metadata = dict[str, Tensor](), dict[str, str]()
    for item in prepared.plan.distinct:
        if item.spec is None:
            continue
        layer = item.spec.module
        own = {
            name: tensor for name, tensor in state.items() if name.startswith(f"{layer}.") and name != f"{layer}.bias"
        }
        stored, described = prepared.quantizer.part_of(layer).as_safetensors(own)
        tensors |= stored
        metadata |= {name: text for name, text in described.items() if name == item.target}
    return tensors, metadata


def _describe(file: Path) -> dict[str, Any]:
    """Return the state and digest of a file."""
    with open_regular(file) as (stream, state):
        return {"state": list(state), "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _check_unchanged(folder: Path, values: Mapping[str, Any]) -> None:
    """Raise LoadError if the weights are not those that were written. values: of entry.json."""
    with open_regular(folder / WEIGHTS) as (_, state):
        if list(state) == values["state"]:
            return
    described = _describe(folder / WEIGHTS)
    if described["sha256"] != values["sha256"]:
        raise LoadError("its weights have changed")
    write_json(folder / ENTRY, {**values, **described})  # copied, or restored


def _size(folder: Path) -> int:
    with suppress(OSError):
        return sum(path.stat().st_size for path in folder.iterdir())
    return 0


def _last_use(folder: Path) -> float:
    with suppress(OSError):
        return (folder / ENTRY).stat().st_mtime
    return 0.0


def _is_alive(pid: str) -> bool:
    return pid.isdecimal() and Path("/proc", pid).exists()
