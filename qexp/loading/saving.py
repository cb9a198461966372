"""Tensors and models to disk, whole or not at all.

A saved model is a folder that this program and diffusers load: `config.json` with `quantization_config`, and
`diffusion_pytorch_model.safetensors` (`model.safetensors` for transformers' models), in shards with an index where it
is larger than one shard may be. A model in GGUF blocks is one `model.gguf`, and its `config.json` is that of the dense
model: the blocks speak for themselves.

Everything is written beside first, and takes the place of a model that was saved there before when all of it is there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor, nn

from qexp.checkpoints.checkpoint import GGUF_CONFIG_KEY, SAVED_GGUF, SAVED_WEIGHTS, refuse_source
from qexp.checkpoints.safetensors_file import write_safetensors
from qexp.errors import ConfigError, DiskError
from qexp.interop.interfaces import interface_of
from qexp.loading.file_layout import COMFYUI_NAMES, InFileLayout, not_for
from qexp.loading.gguf_saving import save_gguf
from qexp.loading.quantized_model import registered_quantizer
from qexp.loading.sharing import distinct_state
from qexp.quantizers.embedded import refused_config
from qexp.system.files import disk_error, replacing, write_bytes, write_json, write_text
from qexp.system.screen import say

STEM = "diffusion_pytorch_model"
TRANSFORMERS_STEM = "model"  # of its own models' files
MAX_SHARD_BYTES = 5 << 30


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file. Raises DiskError for a disk that is full or not writable."""
    with replacing(path) as beside:
        write_safetensors(beside, tensors, {"format": "pt", **(metadata or {})})


def save_model(
    model: nn.Module,
    folder: Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    interchange: bool = False,
    layout: str | None = None,
) -> list[Path]:
    """Save a model that `load_component` loaded, quantized or dequantized, wherever its weights rest.

    interchange: keep the format's own names also where their own library would misread them, with a warning. layout:
    "file" for the names and groups of tensors in the file that it was loaded from (`file_layout.py`); GGUF alone.
    Returns the files written, config.json first.
    Raises: ConfigError for a format that cannot be stored, a model that was loaded by something else, or the folder
    that it was loaded from; DiskError, which leaves a model that was saved there before as it was.
    """
    config = getattr(model, "checkpoint_config", None)
    if config is None:
        raise ConfigError(f"save: this {type(model).__name__} was not loaded by qexp, so its config.json is unknown")
    refuse_source(folder, model.checkpoint_path, "save")  # type: ignore[arg-type]
    interface = interface_of(model)
    config = interface.saved_config(model) if interface is not None else config
    config = {name: value for name, value in config.items() if name not in ("quantization_config", "quantization")}
    quantizer = registered_quantizer(model)
    if layout is not None and (quantizer is None or quantizer.file_format != "gguf"):
        raise not_for(quantizer)
    tensors, metadata = distinct_state(model, quantizer), dict[str, str]()
    if quantizer is not None:
        if not quantizer.is_serializable:
            raise ConfigError(
                f"save: {quantizer.quantization_method} has no format to be stored in; dequantize it first"
            )
        tensors, metadata = quantizer.get_state_dict_and_metadata(tensors)
        if quantizer.file_format == "gguf":
            return _save_as_gguf(folder, tensors, metadata, config, model, layout)
        config["quantization_config"] = quantizer.to_dict(model)
        misread = quantizer.misread(model, "model_type" in config) if interface is not None else None
        if misread is not None:
            if interchange:
                say(f"warning: {folder}: {misread}")
            else:
                tensors = quantizer.under_refused_names(tensors)
                config["quantization_config"] = refused_config(config["quantization_config"])
    shards = list(_shards(_without_twins(tensors), max_shard_bytes))
    stem = TRANSFORMERS_STEM if "model_type" in config else STEM
    names = [f"{stem}-{number + 1:05}-of-{len(shards):05}.safetensors" for number in range(len(shards))]
    names = names if len(shards) > 1 else [f"{stem}.safetensors"]
    with _replace_when_complete(folder) as beside:
        for name, shard in zip(names, shards, strict=True):
            save_tensors(beside / name, shard, metadata)
        if len(shards) > 1:
            index = f"{stem}.safetensors.index.json"
            write_json(beside / index, _index(dict(zip(names, shards, strict=True))))
            names.append(index)
        sides = _copy_carried_files(model, beside)
        _write_config(beside / "config.json", config)
    return [folder / name for name in ("config.json", *sides, *names)]


def layouts_of(models: Mapping[str, nn.Module], layout: str | None) -> dict[str, str | None]:
    """Return the layout to save each component in: one that is not quantized keeps the network's.

    Raises: ConfigError if none is quantized.
    """
    quantized = [name for name, model in models.items() if registered_quantizer(model) is not None]
    if layout is not None and not quantized:
        raise not_for(None)
    return {name: layout if name in quantized else None for name in models}


def _write_config(path: Path, config: Mapping[str, Any]) -> None:
    """Write config.json as the libraries do; they read the word that stands for infinity there."""
    write_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")


def _copy_carried_files(model: Any, beside: Path) -> list[str]:
    """Put the files that the model goes with (a tokenizer's) beside its weights; returns their names."""
    source: Path = model.checkpoint_path
    names = [name for name in model.carried_files if source.is_dir() and (source / name).is_file()]
    for name in names:
        write_bytes(beside / name, (source / name).read_bytes())
    return names


@contextmanager
def _replace_when_complete(folder: Path) -> Iterator[Path]:
    """Provide a folder to write a model to, whose files are moved into `folder` once all of them are there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".save-", dir=folder) as beside:
            yield Path(beside)
            _replace_saved(folder, Path(beside))
    except OSError as error:
        cause = error.__cause__ if isinstance(error, DiskError) else error
        raise disk_error(folder, cause if isinstance(cause, OSError) else error, "save.path=") from error


def _replace_saved(folder: Path, beside: Path) -> None:
    """Put a new model in the place of one saved before, whose shards and index would be taken for the new one's."""
    config, names = folder / "config.json", [path.name for path in beside.iterdir()]
    config.unlink(missing_ok=True)  # until the end: a folder without it is not a checkpoint
    for name in names:
        if name != config.name:
            os.replace(beside / name, folder / name)
    for path in folder.iterdir():
        if SAVED_WEIGHTS.fullmatch(path.name) and path.name not in names:
            path.unlink()
    os.replace(beside / config.name, config)


def _save_as_gguf(
    folder: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    config: Mapping[str, Any],
    model: Any,
    layout: str | None,
) -> list[Path]:
    architecture = str(config.get("_class_name") or config.get("model_type") or "unknown")
    if layout is not None:
        tensors, kind = InFileLayout(tensors, model.file_layout), architecture
        architecture = COMFYUI_NAMES.get(kind, kind)
        if kind not in COMFYUI_NAMES:
            say(f"warning: {folder}: ComfyUI-GGUF has no name for a {kind}; the file's general.architecture is {kind}")
    texts = {GGUF_CONFIG_KEY: json.dumps(config, sort_keys=True), **metadata}
    with _replace_when_complete(folder) as beside:
        save_gguf(beside / SAVED_GGUF, tensors, architecture=architecture, metadata=texts)
        sides = _copy_carried_files(model, beside)
        _write_config(beside / "config.json", config)
    return [folder / name for name in ("config.json", *sides, SAVED_GGUF)]


def _without_twins(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tied tensors once, under the first of their names."""
    kept: dict[Any, str] = {}
    for name, tensor in tensors.items():
        place: Any = name  # empty tensors and wrapper subclasses have no address
        if tensor.numel() and tensor.data_ptr():
            place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
        kept.setdefault(place, name)
    return {name: tensors[name] for name in kept.values()}


def _shards(tensors: Mapping[str, Tensor], limit: int) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors in their order, in parts of at most `limit` bytes (or one tensor)."""
    shard, size = dict[str, Tensor](), 0
    for name, tensor in tensors.items():
        if shard and size + tensor.nbytes > limit:
            yield shard
            shard, size = {}, 0
        shard[name], size = tensor, size + tensor.nbytes
    yield shard


def _index(shards: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    total = sum(tensor.nbytes for shard in shards.values() for tensor in shard.values())
    weight_map = {tensor: name for name, shard in shards.items() for tensor in shard}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
