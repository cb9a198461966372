"""Build a config for every type of every backend: the options of conf/backend, and the other types of their fields.

Composed without Hydra: a yaml over the schema that it inherits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from qexp.config.hydra_schema import schema_of
from qexp.config.plugins import plugin_config, plugin_module, plugin_names
from qexp.config.yaml_options import option_files
from qexp.errors import ConfigError, choices, did_you_mean


def trials(names: list[str]) -> dict[str, Any]:
    """Return the configs to try, by their command line: 'torchao', or 'torchao quant_type=int8dq' without an option.

    names: of the options to try; empty for all types except recipes. Raises: ConfigError for an unknown name.
    """
    options = {path.stem: backend_config(path) for path in backend_files(names)}
    for name in names:
        if (missing := options[name].missing()) is not None:
            raise ConfigError(f"{missing} to python -m qexp, or give doctor the backends of its rules")
    if names:
        return options
    options = {name: config for name, config in options.items() if config.missing() is None}
    found = dict(options)
    for method in dict.fromkeys(config.quant_method for config in options.values()):
        own = {name: config for name, config in options.items() if config.quant_method == method}
        for fields in next(iter(own.values())).types():
            name, changes = _nearest(own, method, fields)
            if changes:
                config = replace(own[name], **changes)
                words = " ".join(f"{field}={_typed(value)}" for field, value in changes.items())
                found[f"{name} {words}"] = replace(config, label=config.describe())
    return dict(sorted(found.items(), key=lambda item: (item[1].quant_method, item[0] not in options, item[0])))


def _nearest(options: Mapping[str, Any], method: str, fields: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return (option, fields to change) with the fewest changes; ties go to the option named like its backend."""
    changes = {
        name: {field: value for field, value in fields.items() if getattr(config, field) != value}
        for name, config in options.items()
    }
    nearest = min(sorted(changes, reverse=True), key=lambda name: (len(changes[name]), name != method, len(name)))
    return nearest, changes[nearest]


def _typed(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def backend_files(names: list[str]) -> list[Path]:
    """Return the yaml files of these options, or of all without names. Raises ConfigError for an unknown name."""
    files = {path.stem: path for path in option_files("backend")}
    for name in names:
        if name not in files:
            raise ConfigError(f"{name} is not an option of backend={did_you_mean(name, files)}; use {choices(files)}")
    return [files[name] for name in names or files]


def backend_config(path: Path) -> Any:
    """Return the config of one option with its defaults. Raises ConfigError."""
    plugin = _plugin_of(path)
    values = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(values, dict), path
    values.pop("defaults", None)
    merged = OmegaConf.merge(OmegaConf.structured(schema_of(plugin_module("backend", plugin).Config)), values)
    return plugin_config("backend", OmegaConf.to_container(merged, resolve=True), "backend")


def _plugin_of(path: Path) -> str:
    inherited = re.search(r"/schema/backend/(\w+)@", path.read_text(encoding="utf-8"))
    names = plugin_names("backend")
    if inherited is None or inherited[1] not in names:
        raise ConfigError(
            f"{path} inherits no schema; its defaults need /schema/backend/<name>@_here_: {choices(names)}"
        )
    return inherited[1]
