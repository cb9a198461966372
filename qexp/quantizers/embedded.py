"""The `quantization_config` in a checkpoint's config.json: what the checkpoint is, whatever the user asks for.

The checkpoint wins over the user's backend, with a warning that says which fields lost. This module imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from qexp.errors import ConfigError, LoadError, choices
from qexp.plugins import plugin_module, plugin_names
from qexp.quantizers.configs import plain

LOAD_FLAGS = ("load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit")  # all that old files say


def embedded_config(config: Mapping[str, Any], place: str | Path) -> Any:
    """The backend config that `config` (a parsed config.json) embeds, or None. Raises LoadError for an unknown one."""
    embedded = config.get("quantization_config")
    if embedded is None:
        return None
    if not isinstance(embedded, Mapping):
        raise LoadError(f"'{place}': quantization_config must be a JSON object")
    by_flags = any(embedded.get(name) for name in LOAD_FLAGS)
    method = str(plain(embedded.get("quant_method", "bitsandbytes" if by_flags else None)))
    readable = [name for name in plugin_names("backend") if plugin_module("backend", name).Quantizer.is_serializable]
    if method not in readable:
        raise LoadError(
            f"'{place}' is quantized with quant_method={method!r}, which cannot be read; "
            f"readable are {choices(readable)}"
        )
    try:
        return plugin_module("backend", method).Config.from_dict(embedded)
    except (ConfigError, TypeError, AttributeError) as error:
        raise LoadError(f"'{place}': quantization_config of {method} cannot be read: {error}") from None


def merge(asked: Any, embedded: Any) -> list[str]:
    """What of the user's backend config loses against the checkpoint's: 'field=value (the checkpoint has …)'."""
    if asked.quant_method == "none":
        return []
    if asked.quant_method != embedded.quant_method:
        return [f"quant_method={asked.quant_method} (the checkpoint has {embedded.quant_method})"]
    default = type(asked)()
    lost = []
    for item in fields(asked):
        mine, theirs = getattr(asked, item.name), getattr(embedded, item.name)
        if item.name != "label" and mine != theirs and mine != getattr(default, item.name):
            lost.append(f"{item.name}={mine} (the checkpoint has {theirs})")
    return lost
