"""What there is to try: the options of conf/backend as configs, and types of a backend that no option is for.

Options are composed without Hydra: a yaml over the schema that it inherits.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from qexp.errors import ConfigError, choices, did_you_mean
from qexp.options import option_files
from qexp.plugins import plugin_config, plugin_module, plugin_names
from qexp.schema import schema_of


def backend_files(names: list[str]) -> list[Path]:
    """The yamls of these options, of all if there are no names. Raises ConfigError for a name that is none."""
    files = {path.stem: path for path in option_files("backend")}
    for name in names:
        if name not in files:
            raise ConfigError(f"{name} is no option of backend{did_you_mean(name, files)}; use {choices(files)}")
    return [files[name] for name in names or files]


def backend_config(path: Path) -> Any:
    """The config of one option with its own defaults. Raises ConfigError."""
    plugin = _plugin_of(path)
    values = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(values, dict), path
    values.pop("defaults", None)
    merged = OmegaConf.merge(OmegaConf.structured(schema_of(plugin_module("backend", plugin).Config)), values)
    return plugin_config("backend", OmegaConf.to_container(merged, resolve=True), "backend")


def further_types(configs: Sequence[Any]) -> list[tuple[str, Any]]:
    """(name, config) of the types that backends have beside those of `configs`, as 'torchao quant_type=int4dq'."""
    found = []
    for plugin in plugin_names("backend"):
        cls = plugin_module("backend", plugin).Config
        of_options = [config for config in configs if isinstance(config, cls)]
        covered = {getattr(config, cls.type_field) for config in of_options if cls.type_field}
        for name in (name for name in cls.types if name not in covered):
            values = {"quant_method": plugin, cls.type_field: name, "label": name}
            found.append((f"{plugin} {cls.type_field}={name}", plugin_config("backend", values, "backend")))
    return found


def _plugin_of(path: Path) -> str:
    inherited = re.search(r"/schema/backend/(\w+)@", path.read_text(encoding="utf-8"))
    names = plugin_names("backend")
    if inherited is None or inherited[1] not in names:
        raise ConfigError(
            f"{path} inherits no schema; its defaults need /schema/backend/<name>@_here_: {choices(names)}"
        )
    return inherited[1]
