"""Find the quantization of a checkpoint: `quantization_config` in its config.json, or the types of its GGUF blocks.

The checkpoint overrides the user's backend, with a warning that names the overridden fields. Settings that GGUF blocks
do not store (compute dtype, layers to decode) come from the user's GGUF backend. This module imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from qexp.checkpoints.checkpoint import Checkpoint
from qexp.checkpoints.gguf_types import DECODABLE
from qexp.config.plugins import plugin_module, plugin_names
from qexp.errors import ConfigError, LoadError, choices
from qexp.quantizers.configs import plain
from qexp.quantizers.gguf import COMPUTE_DTYPE_KEY, GGUFConfig, saved_dtype

REFUSED_PREFIX = "qexp_"  # of a quant_method that other libraries do not know
REFUSED_FIELDS = "config"
LOAD_FLAGS = ("load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit")  # all that old files say


def refused_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a `quantization_config` that other libraries reject, for models that they would misread."""
    return {"quant_method": REFUSED_PREFIX + str(plain(values["quant_method"])), REFUSED_FIELDS: dict(values)}


def stored_config(checkpoint: Checkpoint, asked: Any) -> Any:
    """Return the backend config of a quantized checkpoint, or None for an unquantized one.

    asked: the user's backend config. Raises: LoadError for a format that cannot be read.
    """
    nbytes = _bytes_by_block_type(checkpoint)
    if not nbytes:
        return embedded_config(checkpoint.config, checkpoint.path)
    own = asked if asked.quant_method == "gguf" else GGUFConfig()
    compute_dtype = own.compute_dtype or saved_dtype(checkpoint.metadata, COMPUTE_DTYPE_KEY)
    most = max(nbytes, key=lambda name: nbytes[name])
    return replace(own, quant_type=most, label=most, compute_dtype=compute_dtype, pre_quantized=True)


def is_quantized(checkpoint: Checkpoint) -> bool:
    """Return whether a checkpoint holds quantized weights."""
    return checkpoint.config.get("quantization_config") is not None or bool(_bytes_by_block_type(checkpoint))


def _bytes_by_block_type(checkpoint: Checkpoint) -> dict[str, int]:
    """Return GGUF type -> bytes of its tensors. Raises LoadError for a type that cannot be decoded."""
    nbytes: dict[str, int] = {}
    for entry in checkpoint.entries.values():
        kind = entry.block_type
        if kind is None:
            continue
        if kind not in DECODABLE:
            raise LoadError(
                f"'{entry.name}' in '{entry.file}' has type {kind}, which cannot be decoded; convert the file to "
                f"{choices(DECODABLE)}"
            )
        nbytes[kind] = nbytes.get(kind, 0) + entry.nbytes
    return nbytes


def embedded_config(config: Mapping[str, Any], place: str | Path) -> Any:
    """Return the backend config in a parsed config.json, or None. Raises LoadError for an unknown one."""
    embedded = config.get("quantization_config")
    if embedded is None:
        return None
    if not isinstance(embedded, Mapping):
        raise LoadError(f"'{place}': quantization_config must be a JSON object; download its config.json again")
    own = embedded.get(REFUSED_FIELDS)
    if isinstance(own, Mapping) and embedded.get("quant_method") == f"{REFUSED_PREFIX}{own.get('quant_method')}":
        embedded = own
    by_flags = any(embedded.get(name) for name in LOAD_FLAGS)
    method = str(plain(embedded.get("quant_method", "bitsandbytes" if by_flags else None)))
    readable = [name for name in plugin_names("backend") if plugin_module("backend", name).Quantizer.is_serializable]
    if method not in readable:
        raise LoadError(
            f"'{place}' is quantized with quant_method={method!r}, which is not supported (supported: "
            f"{choices(readable)}); use the program that wrote it, or the unquantized checkpoint"
        )
    try:
        return plugin_module("backend", method).Config.from_dict(embedded)
    except (ConfigError, TypeError, AttributeError) as error:
        raise LoadError(
            f"'{place}': quantization_config of {method} cannot be read: {error}; check its config.json"
        ) from None


def merge(asked: Any, embedded: Any) -> list[str]:
    """Return the user's settings that the checkpoint overrides: 'field=value (the checkpoint has …)'."""
    if asked.quant_method == "none":
        return []
    if asked.quant_method != embedded.quant_method:
        return [f"quant_method={asked.quant_method} (the checkpoint has {embedded.quant_method})"]
    default, lost = type(asked)(), []
    kinds = asked.quantization_method(), embedded.quantization_method()
    if kinds[0] != kinds[1]:  # also where a default chose it
        lost.append(f"{kinds[0]} (the checkpoint has {kinds[1]})")
    for item in fields(asked):
        mine, theirs = getattr(asked, item.name), getattr(embedded, item.name)
        if item.name != "label" and mine != theirs and mine != getattr(default, item.name):
            lost.append(f"{item.name}={mine} (the checkpoint has {theirs})")
    return lost
