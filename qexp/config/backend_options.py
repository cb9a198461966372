"""Read options of conf/ for Python callers: a backend's config, a model's list of unquantized modules."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from qexp.config.plugins import plugin_config, plugin_names
from qexp.config.yaml_options import conf_folder, option_names, options_of_plugin
from qexp.errors import ConfigError, choices, did_you_mean
from qexp.system.files import read_yaml

REFERENCE = re.compile(r"\$\{\.(\w+)\}")  # to another field of the same option


def backend_of(option: str, fields: Mapping[str, Any] | None = None) -> Any:
    """Return the config of an option of conf/backend, as `backend=<option> backend.<field>=…` composes it.

    option: a name, or "@recipe.yaml", which is `backend=mixed` with that recipe.
    Raises: ConfigError.
    """
    if option.startswith("@"):
        return backend_of("mixed", {"recipe": option})
    if option not in option_names("backend"):
        names = option_names("backend")
        raise ConfigError(f"backend={option!r} is unknown{did_you_mean(option, names)}; use {choices(names)}")
    written = _read_option(f"backend/{option}.yaml")
    plugin = next(name for name in plugin_names("backend") if option in options_of_plugin("backend", name))
    del written["defaults"]
    values = {"quant_method": plugin, **written, **(fields or {})}
    if REFERENCE.search(str(values.setdefault("label", None))):  # not by OmegaConf, whose import is slow
        named = vars(plugin_config("backend", {**values, "label": None}, "backend"))
        values["label"] = REFERENCE.sub(lambda found: str(named.get(found[1], found[0])), values["label"])
    if unresolved := [name for name, value in values.items() if isinstance(value, str) and "${" in value]:
        name = unresolved[0]
        raise ConfigError(
            f"backend.{name}={values[name]}, of backend={option}, is resolved on the command line alone; only a label "
            "may refer to other fields, those of its option: ${.quant_type}"
        )
    return plugin_config("backend", values, "backend")


def _read_option(name: str) -> dict[str, Any]:
    """Return what a yaml file of conf/ says."""
    return read_yaml(conf_folder() / name) or {}


@cache
def default_backend() -> Any:
    """Return the default backend of conf/config.yaml."""
    written = _read_option("config.yaml")
    return backend_of(next(entry["backend"] for entry in written["defaults"] if "backend" in entry))


def model_skip_modules(option: str) -> tuple[str, ...]:
    """Return the modules that an option of conf/model leaves unquantized."""
    written = _read_option(f"model/{option}.yaml")
    return tuple(written.get("skip_modules", ()))
