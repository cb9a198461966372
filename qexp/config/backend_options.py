"""Read options of conf/ for Python callers: a backend's config, a model's list of unquantized modules."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

import yaml

from qexp.config.plugins import plugin_config, plugin_names
from qexp.config.yaml_options import conf_folder, option_names, options_of_plugin
from qexp.errors import ConfigError, choices, did_you_mean

REFERENCE = re.compile(r"\$\{\.(\w+)\}")  # to another field of the same option
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


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
    written = _read(f"backend/{option}.yaml")
    plugin = next(name for name in plugin_names("backend") if option in options_of_plugin("backend", name))
    del written["defaults"]
    values = {"quant_method": plugin, **written, **(fields or {})}
    if REFERENCE.search(str(values["label"])):  # resolved as by OmegaConf, whose import takes a tenth of a second
        named = vars(plugin_config("backend", {**values, "label": None}, "backend"))
        values["label"] = REFERENCE.sub(lambda found: str(named[found[1]]), values["label"])
    return plugin_config("backend", values, "backend")


def _read(name: str) -> dict[str, Any]:
    """Return what a yaml file of conf/ says."""
    read: dict[str, Any] = yaml.load((conf_folder() / name).read_text(encoding="utf-8"), _LOADER)
    return read


@cache
def default_backend() -> Any:
    """Return the default backend of conf/config.yaml."""
    written = _read("config.yaml")
    return backend_of(next(entry["backend"] for entry in written["defaults"] if "backend" in entry))


def model_skip_modules(option: str) -> tuple[str, ...]:
    """Return the modules that an option of conf/model leaves unquantized."""
    written = _read(f"model/{option}.yaml")
    return tuple(written.get("skip_modules", ()))
