"""Read options of conf/ for Python callers: a backend's config, a model's list of unquantized modules."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from qexp.config.plugins import plugin_config, plugin_module, plugin_names
from qexp.config.yaml_options import conf_folder, option_names, options_of_plugin
from qexp.errors import ConfigError, choices, did_you_mean


def backend_of(option: str, fields: Mapping[str, Any] | None = None) -> Any:
    """Return the config of an option of conf/backend, as `backend=<option> backend.<field>=…` composes it.

    option: a name, or "@recipe.yaml", which is `backend=mixed` with that recipe.
    Raises: ConfigError.
    """
    from omegaconf import OmegaConf

    from qexp.config.hydra_schema import schema_of

    if option.startswith("@"):
        return backend_of("mixed", {"recipe": option})
    if option not in option_names("backend"):
        names = option_names("backend")
        raise ConfigError(f"backend={option!r} is unknown{did_you_mean(option, names)}; use {choices(names)}")
    written: Any = OmegaConf.to_container(OmegaConf.load(conf_folder() / "backend" / f"{option}.yaml"))
    plugin = next(name for name in plugin_names("backend") if option in options_of_plugin("backend", name))
    del written["defaults"]
    schema: Any = OmegaConf.to_container(OmegaConf.structured(schema_of(plugin_module("backend", plugin).Config)))
    # merged as plain values, whose types the config itself checks; labels refer to other fields
    merged = OmegaConf.create({**schema, **written, **(fields or {})})
    return plugin_config("backend", OmegaConf.to_container(merged, resolve=True), "backend")


@cache
def default_backend() -> Any:
    """Return the default backend of conf/config.yaml."""
    from omegaconf import OmegaConf

    written: Any = OmegaConf.load(conf_folder() / "config.yaml")
    return backend_of(next(entry["backend"] for entry in written["defaults"] if "backend" in entry))


def model_skip_modules(option: str) -> tuple[str, ...]:
    """Return the modules that an option of conf/model leaves unquantized."""
    from omegaconf import OmegaConf

    written: Any = OmegaConf.load(conf_folder() / "model" / f"{option}.yaml")
    return tuple(written.get("skip_modules", ()))
