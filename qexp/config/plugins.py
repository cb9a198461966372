"""Find backends, model sources and tasks: every plugin file of a package is an option with the file's name.

A plugin is a module that binds `Config`, a frozen dataclass, at its top level. Plugins are recognized by their syntax
tree, so that other modules in the folder (a network, a tensor subclass) are never imported.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from qexp.config.dataclass_io import from_plain
from qexp.errors import ConfigError, choices, did_you_mean

PACKAGE_FOLDER = Path(__file__).parents[1]
BINDS_CONFIG = re.compile(r"^(Config\s*=|class Config\b)", re.MULTILINE)  # the file is not imported for that
# group -> (package whose files are the options, the field that names the file)
PLUGINS = {
    "model": ("qexp.models", "source"),
    "backend": ("qexp.quantizers", "quant_method"),
    "task": ("qexp.tasks", "name"),
}


@cache
def plugin_names(group: str) -> tuple[str, ...]:
    """Return the options of a plugin group, sorted."""
    folder = PACKAGE_FOLDER.joinpath(*PLUGINS[group][0].split(".")[1:])
    texts = {path.stem: path.read_text(encoding="utf-8") for path in folder.glob("*.py")}
    return tuple(sorted(name for name, text in texts.items() if BINDS_CONFIG.search(text)))


def plugin_module(group: str, name: str) -> ModuleType:
    return importlib.import_module(f"{PLUGINS[group][0]}.{name}")


def plugin_config(group: str, values: Any, place: str) -> Any:
    """Build the frozen config of the plugin that `values` names; `place` is its path in the config, for messages."""
    names = plugin_names(group)
    field_name = PLUGINS[group][1]
    if values is None:
        raise ConfigError(f"{place}=null chooses nothing; use {choices(names)}")
    if not isinstance(values, Mapping):
        remedy = f"write {place}={values} on the command line, or 'override /{group}: {values}' in a yaml's defaults"
        raise ConfigError(f"{place}={values} must be a group of fields, not a name; {remedy}")
    if field_name not in values:
        raise ConfigError(f"{place}.{field_name} is missing; use {choices(names)}")
    name = values[field_name]
    if name not in names:
        raise ConfigError(f"{place}.{field_name}={name} is unknown{did_you_mean(name, names)}; use {choices(names)}")
    return from_plain(plugin_module(group, str(name)).Config, values, place)
