"""Open a checkpoint: its config, and the place of each tensor's bytes. Reads headers only; imports no torch.

A checkpoint is a folder with `config.json` and weights (`weight_files.py` says which files those are); or a single
`.safetensors` or `.gguf` file, or the index of some shards. An index decides which of its files a tensor is read from.
The config of a file is the `config.json` beside it; without one, a `.gguf` file has it in its metadata if this program
saved it.

`safetensors_header.py` and `gguf_header.py` parse the headers and validate every count, length and offset in them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from io import BufferedReader
from pathlib import Path
from typing import Any

from qexp.checkpoints.content import content_digest
from qexp.checkpoints.foreign_files import REAL_FILES, convert_remedy, pickles_in, refuse_cache_folder, refuse_foreign
from qexp.checkpoints.gguf_header import parse_gguf_header
from qexp.checkpoints.parse_once import parse_once
from qexp.checkpoints.regular_file import FileState, unreadable
from qexp.checkpoints.safetensors_header import parse_safetensors_header
from qexp.checkpoints.scaled_weights import with_scales_applied
from qexp.checkpoints.tensor_entry import FileHeader, TensorEntry
from qexp.checkpoints.weight_files import shard_files, weight_files, weight_map
from qexp.errors import ConfigError, LoadError, WrongFileError, first_names

GGUF_CONFIG_KEY = "qexp.config"  # metadata of a GGUF file: its config.json
SAVED_GGUF = "model.gguf"
SAVED_WEIGHTS = re.compile(  # what `loading/saving.py` calls the weights of a model
    r"(diffusion_pytorch_)?model((-\d{5}-of-\d{5})?\.safetensors|\.safetensors\.index\.json)|" + re.escape(SAVED_GGUF)
)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's config and tensors.

    config: parsed config.json ({} for a single file without one). entries: tensor name -> place. metadata: of the
    files. converted_names: tensors that have another name in the files than in `entries`.
    """

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
        """Return a hash of the config and the files' contents, which is equal for a copy.

        full: read large files completely instead of samples (`content.py`).
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for file in self.files:
            digest.update(content_digest(file, full=full, header=read_header).encode())
        if len(self.files) > 1:  # an index says from which of them a tensor is read
            where = sorted((entry.name, self.files.index(entry.file)) for entry in self.entries.values())
            digest.update(json.dumps(where).encode())
        return digest.hexdigest()


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Read config and headers of a folder or of one file. Raises LoadError."""
    path = Path(path)
    if not os.path.exists(path):
        raise LoadError(
            f"checkpoint '{path}' does not exist; give a folder with config.json and safetensors, or a .safetensors or "
            ".gguf file"
        )
    refuse_cache_folder(path)
    files, index = _files(path)
    placed = {} if index is None else weight_map(read_object(index), f"'{index}'")
    entries: dict[str, TensorEntry] = {}
    metadata: dict[str, str] = {}
    for file in files:
        header = read_header(file)
        metadata.update(header.metadata)
        for entry in header.entries:
            if placed.get(entry.name, file.name) != file.name:
                continue  # left in another shard by an earlier save
            if entry.name in entries:
                raise LoadError(
                    f"tensor '{entry.name}' is in both '{entries[entry.name].file}' and '{file}', and the index does "
                    "not choose one; download both again"
                )
            entries[entry.name] = entry
    if wrong := [name for name in placed if name not in entries]:
        raise LoadError(
            f"'{index}' says that '{wrong[0]}' is in '{placed[wrong[0]]}', but it is not; download both again"
        )
    config, entries = with_scales_applied(_config_of(path, metadata), entries, metadata)
    return Checkpoint(path, config, entries, files, metadata)


def open_component(source: Any, component: str) -> Checkpoint:
    """Open one component of a model source. Its config is the checkpoint's own, else the source's."""
    checkpoint = open_checkpoint(source.checkpoints()[component])
    config = source.component_config(component)
    states_class = any(name in checkpoint.config for name in ("_class_name", "architectures", "model_type"))
    return checkpoint if config is None or states_class else replace(checkpoint, config=config)


def open_components(source: Any) -> dict[str, Checkpoint]:
    return {name: open_component(source, name) for name in source.checkpoints()}


def refuse_source(folder: Path, source: Path, place: str) -> None:
    """Raise ConfigError if the checkpoint `source` is in `folder`: saving a model there would overwrite it."""
    own = source if source.is_dir() else source.parent
    if os.path.exists(folder) and os.path.exists(own) and os.path.samefile(folder, own):
        raise ConfigError(
            f"{place}: '{folder}' contains the checkpoint that the model is loaded from, and saving would overwrite "
            "it; choose another folder"
        )


def is_gguf(file: Path) -> bool:
    return file.suffix.lower() == ".gguf"


def _config_of(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return config.json of the folder, or the one beside the file, or the one inside a GGUF file, or {}."""
    if path.is_dir():
        return read_object(path / "config.json")
    if os.path.exists(path.with_name("config.json")):
        return read_object(path.with_name("config.json"))
    if not is_gguf(path):
        return {}
    return _json_object(metadata.get(GGUF_CONFIG_KEY, "{}"), f"{path}: {GGUF_CONFIG_KEY}")


def read_header(file: Path) -> FileHeader:
    """Read the header of a .safetensors or .gguf file, once in a process. Raises LoadError if it is damaged."""
    return parse_once(file, _parse_gguf if is_gguf(file) else parse_safetensors_header)


def _parse_gguf(file: Path, stream: BufferedReader, state: FileState) -> FileHeader:
    """Parse the file of a whole model. Only strings are kept of its metadata, which may hold a large vocabulary."""
    header = parse_gguf_header(file, stream, state)
    parts = header.metadata.get("split.count", 0)
    if isinstance(parts, int) and parts > 1:
        raise LoadError(f"'{file}' is one of {parts} parts; merge them with llama.cpp's gguf-split --merge")
    return header._replace(metadata={name: text for name, text in header.metadata.items() if isinstance(text, str)})


def read_object(file: Path) -> dict[str, Any]:
    """Read the JSON object in a file, parsed once in a process; the caller may change it. Raises LoadError."""
    return deepcopy(parse_once(file, _parse_object))


def _parse_object(file: Path, stream: BufferedReader, state: FileState) -> dict[str, Any]:
    refuse_foreign(file, stream)
    return _json_object(stream.read(), str(file))


def _json_object(text: str | bytes, place: str) -> dict[str, Any]:
    try:
        value = json.loads(text if isinstance(text, str) else text.decode())
    except (ValueError, RecursionError) as error:
        raise LoadError(f"'{place}' is not valid JSON: {error}; download it again") from None
    if not isinstance(value, dict):
        raise LoadError(f"'{place}' must hold a JSON object; download it again")
    return value


def _files(path: Path) -> tuple[tuple[Path, ...], Path | None]:
    """Return (files with tensors, their index or None) of a folder, an index or a single file."""
    if not path.is_dir() and path.suffix != ".json":
        return (path,), None
    folder = path if path.is_dir() else path.parent
    names = _names(folder)
    if path.name in names and path.name in REAL_FILES:
        raise WrongFileError(f"'{path}' describes a model and has no weights; give its folder, '{folder}'")

    def read(name: str) -> dict[str, Any]:
        return read_object(folder / name)

    if path.is_dir():
        found = weight_files(names, read, f"'{folder}'")
    else:
        found = [path.name, *shard_files(path.name, names, read, f"'{folder}'")]
    if not found:
        if "model_index.json" in names:
            raise LoadError(f"'{folder}' is a diffusers pipeline; use model=diffusers, in Python qexp.load_pipeline")
        if pickles := pickles_in(folder, names):
            shown = first_names([file.name for file in pickles])
            raise WrongFileError(
                f"'{folder}' has only pickle files ({shown}), which are not opened; {convert_remedy(pickles)}"
            )
        raise LoadError(
            f"'{folder}' has no weights; give a folder with one .safetensors or .gguf file, or shards and their index"
        )
    index = folder / found[0] if found[0].endswith(".json") else None
    return tuple(folder / name for name in found if not name.endswith(".json")), index


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise unreadable(folder, error) from None
