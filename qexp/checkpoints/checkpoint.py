"""What a checkpoint on disk holds: its config and where each tensor's bytes are. Reads headers only; imports no torch.

A checkpoint is a folder with `config.json` and one `*.safetensors` file, shards with a `*.safetensors.index.json`, or
(if it has neither) one `*.gguf` file; or a single `.safetensors` or `.gguf` file, or the index of some shards. The
config of a file is the `config.json` beside it; without one, a `.gguf` file has it in its metadata if this program
saved it.

The headers are read by `safetensors_header.py` and `gguf_header.py`, which check everything a damaged file could lie
about.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from reprlib import repr as brief
from typing import Any

from qexp.checkpoints.content import content_digest
from qexp.checkpoints.gguf_header import read_gguf, read_gguf_header
from qexp.checkpoints.regular_file import read_regular, unreadable
from qexp.checkpoints.safetensors_header import read_safetensors_header
from qexp.checkpoints.scaled_weights import with_scales_applied
from qexp.checkpoints.tensor_entry import TensorEntry
from qexp.errors import ConfigError, LoadError

GGUF_CONFIG_KEY = "qexp.config"  # metadata of a GGUF file: its config.json
STANDARD_NAMES = ("diffusion_pytorch_model.safetensors", "model.safetensors")  # win over other files beside them
SAVED_GGUF = "model.gguf"
SAVED_WEIGHTS = re.compile(  # what `loading/saving.py` calls the weights of a model
    r"(diffusion_pytorch_)?model((-\d{5}-of-\d{5})?\.safetensors|\.safetensors\.index\.json)|" + re.escape(SAVED_GGUF)
)


@dataclass(frozen=True)
class Checkpoint:
    """config: parsed config.json ({} for a bare file); entries: tensor name -> where it lies; metadata: the files';
    converted_names: of tensors in the files that have other names in `entries`."""

    path: Path
    config: Mapping[str, Any]
    entries: Mapping[str, TensorEntry]
    files: tuple[Path, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    converted_names: frozenset[str] = frozenset()

    @cached_property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries.values())

    def content_hash(self, *, full: bool = False) -> str:
        """A hash of the config and of what is in the files: a copy has the same one.

        full: read all of large files; see `content.py`.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for file in self.files:
            digest.update(content_digest(file, full=full, header=_tensors_and_header_bytes).encode())
        if len(self.files) > 1:  # an index says from which of them a tensor is read
            where = sorted((entry.name, self.files.index(entry.file)) for entry in self.entries.values())
            digest.update(json.dumps(where).encode())
        return digest.hexdigest()


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Read config and headers of a folder or of one file. Raises LoadError."""
    path = Path(path)
    if not os.path.exists(path):
        raise LoadError(
            f"checkpoint '{path}' does not exist; set model.path to a folder with config.json and safetensors, or to a "
            ".gguf file"
        )
    files = _files(path) if path.is_dir() else _shards(path) if path.suffix == ".json" else (path,)
    entries: dict[str, TensorEntry] = {}
    metadata: dict[str, str] = {}
    for file in files:
        header_entries, header_metadata = read_header(file)
        metadata.update(header_metadata)
        for entry in header_entries:
            if entry.name in entries:
                raise LoadError(
                    f"tensor '{entry.name}' is in both '{entries[entry.name].file}' and '{file}'; download both again"
                )
            entries[entry.name] = entry
    _check_index(path, entries)
    config, entries = with_scales_applied(_config_of(path, metadata), entries, metadata)
    return Checkpoint(path, config, entries, files, metadata)


def open_component(source: Any, component: str) -> Checkpoint:
    """The checkpoint of one component of a model source, with the config that the source knows for it if it has
    none.
    """
    checkpoint = open_checkpoint(source.checkpoints()[component])
    config = source.component_config(component) if hasattr(source, "component_config") else None
    return checkpoint if config is None else replace(checkpoint, config=config)


def open_components(source: Any) -> dict[str, Checkpoint]:
    return {name: open_component(source, name) for name in source.checkpoints()}


def refuse_source(folder: Path, source: Path, place: str) -> None:
    """Raises ConfigError if the checkpoint `source` is in `folder`: a model saved there would replace it."""
    own = source if source.is_dir() else source.parent
    if os.path.exists(folder) and os.path.exists(own) and os.path.samefile(folder, own):
        raise ConfigError(
            f"{place}: '{folder}' holds the checkpoint that the model comes from, and saving there would replace it; "
            "choose another folder"
        )


def is_gguf(file: Path) -> bool:
    return file.suffix.lower() == ".gguf"


def _config_of(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """config.json of the folder, or beside the file; else the one in a GGUF file; {} if there is none."""
    if path.is_dir():
        return read_object(path / "config.json")
    if os.path.exists(path.with_name("config.json")):
        return read_object(path.with_name("config.json"))
    if not is_gguf(path):
        return {}
    return _json_object(metadata.get(GGUF_CONFIG_KEY, "{}"), f"{path}: {GGUF_CONFIG_KEY}")


def read_header(file: Path) -> tuple[list[TensorEntry], dict[str, str]]:
    """(tensors in the order of their bytes, texts of the metadata) of one file. Raises LoadError if it is damaged."""
    if is_gguf(file):
        return read_gguf(file)
    header = read_safetensors_header(file)
    return list(header.entries), dict(header.metadata)


def _tensors_and_header_bytes(file: Path) -> tuple[Sequence[TensorEntry], int]:
    header = read_gguf_header(file) if is_gguf(file) else read_safetensors_header(file)
    return header.entries, header.nbytes


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises LoadError."""
    return _json_object(read_regular(file), str(file))


def _json_object(text: str | bytes, place: str) -> dict[str, Any]:
    try:
        value = json.loads(text if isinstance(text, str) else text.decode())
    except (ValueError, RecursionError) as error:
        raise LoadError(f"'{place}' is not valid JSON: {error}; download it again") from None
    if not isinstance(value, dict):
        raise LoadError(f"'{place}' must hold a JSON object; download it again")
    return value


def _files(folder: Path) -> tuple[Path, ...]:
    """The files of a folder: those its index names, its only safetensors file, or its only GGUF file."""
    index = _index_file(folder)
    if index is None:
        return (folder / only_weights_name(_names(folder), f"'{folder}'"),)
    return _shards(index)


def _shards(index: Path) -> tuple[Path, ...]:
    folder, names = index.parent, shard_names(read_object(index), f"'{index}'")
    for name in names:
        if not os.path.isfile(folder / name):
            raise LoadError(f"'{index}' names the shard {name!r}, which is missing in '{folder}'; download it again")
    return tuple(folder / name for name in names)


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise unreadable(folder, error) from None


def only_weights_name(names: Sequence[str], place: str) -> str:
    """The weights among the files of a folder that has no index. Raises LoadError unless it is clear which they are."""
    found = [name for name in names if name.endswith(".safetensors")]
    found = [name for name in found if name in STANDARD_NAMES] or found
    in_gguf = [] if found else [name for name in names if name.endswith(".gguf")]
    if len(in_gguf) > 1:
        raise LoadError(f"{place} has several .gguf files ({', '.join(in_gguf)}); set model.path to one of them")
    if len(found + in_gguf) != 1:
        listed = ", ".join(found) or "none"
        if "model_index.json" in names:
            raise LoadError(f"{place} is a pipeline of diffusers: use model=diffusers, in Python qexp.load_pipeline")
        raise LoadError(f"{place} needs one .safetensors file (or .gguf), or shards with an index; found: {listed}")
    return (found + in_gguf)[0]


def index_name(names: Sequence[str], place: str) -> str | None:
    """The index of shards among the files of a folder, if it has one. Raises LoadError if it has several."""
    found = [name for name in names if name.endswith(".safetensors.index.json")]
    if len(found) > 1:
        raise LoadError(f"{place} has several indices ({', '.join(found)}); keep one")
    return found[0] if found else None


def shard_names(index: Mapping[str, Any], place: str) -> list[str]:
    """The files that a parsed index names. Raises LoadError if they are none of its own folder."""
    names = sorted({*_weight_map(index, place).values()})
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise LoadError(
                f"{place} names {name!r}; shards must be .safetensors files in the same folder: download it again"
            )
    return names


def _index_file(folder: Path) -> Path | None:
    name = index_name(_names(folder), f"'{folder}'")
    return folder / name if name is not None else None


def _weight_map(index: Mapping[str, Any], place: str) -> dict[str, str]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise LoadError(f"{place} has no weight_map; download it again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise LoadError(f"{place} names {brief(shard)} for '{name}', not a file; download it again")
    return weight_map


def _check_index(path: Path, entries: Mapping[str, TensorEntry]) -> None:
    """An index and the headers of its shards must agree on which tensor is where."""
    index = _index_file(path) if path.is_dir() else path if path.suffix == ".json" else None
    if index is None:
        return
    weight_map = _weight_map(read_object(index), f"'{index}'")
    wrong = [n for n, shard in weight_map.items() if n not in entries or entries[n].file.name != shard]
    if wrong:
        raise LoadError(
            f"'{index}' says that '{wrong[0]}' is in '{weight_map[wrong[0]]}', but it is not; download both again"
        )
