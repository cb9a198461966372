"""The `quantization_config` in a checkpoint's config.json: what the checkpoint is, whatever the user asks for.

The checkpoint wins over the user's backend, with a warning that says which fields lost. This module imports no torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from qexp.errors import ConfigError, LoadError, choices
from qexp.plugins import plugin_names


def embedded_config(config: Mapping[str, Any], place: str | Path) -> Any:
    """The backend config that `config` (a parsed config.json) embeds, or None. Raises LoadError for an unknown one."""
    embedded = config.get("quantization_config")
    if embedded is None:
        return None
    if not isinstance(embedded, Mapping):
        raise LoadError(f"'{place}': quantization_config must be a JSON object")
    method = str(embedded.get("quant_method", "bitsandbytes" if "load_in_4bit" in embedded else None))
    readable = [name for name in plugin_names("backend") if hasattr(_config_class(name), "from_dict")]
    if method not in readable:
        raise LoadError(
            f"'{place}' is quantized with quant_method={method!r}, which cannot be read; "
            f"readable are {choices(readable)}"
        )
    try:
        return _config_class(method).from_dict(embedded)
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


def _config_class(method: str) -> Any:
    return importlib.import_module(f"qexp.quantizers.{method}").Config
