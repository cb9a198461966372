"""The yaml files in conf/ that Python callers name: a backend's config, a model's list of unquantized modules."""

from __future__ import annotations

from functools import cache
from typing import Any

from qexp.config.plugins import plugin_config, plugin_module, plugin_names
from qexp.config.yaml_options import conf_folder, option_names, options_of_plugin
from qexp.errors import ConfigError, choices, did_you_mean


def backend_of(option: str) -> Any:
    """The config of an option of conf/backend, as `backend=<option>` composes it. Raises: ConfigError."""
    from omegaconf import OmegaConf

    from qexp.config.hydra_schema import schema_of

    if option not in option_names("backend"):
        names = option_names("backend")
        raise ConfigError(f"backend={option!r} is unknown{did_you_mean(option, names)}; use {choices(names)}")
    written: Any = OmegaConf.load(conf_folder() / "backend" / f"{option}.yaml")
    plugin = next(name for name in plugin_names("backend") if option in options_of_plugin("backend", name))
    del written["defaults"]
    values = OmegaConf.merge(OmegaConf.structured(schema_of(plugin_module("backend", plugin).Config)), written)
    return plugin_config("backend", OmegaConf.to_container(values, resolve=True), "backend")


@cache
def default_backend() -> Any:
    """The backend that nobody asked for: the one in the defaults of conf/config.yaml."""
    from omegaconf import OmegaConf

    written: Any = OmegaConf.load(conf_folder() / "config.yaml")
    return backend_of(next(entry["backend"] for entry in written["defaults"] if "backend" in entry))


def model_skip_modules(option: str) -> tuple[str, ...]:
    """The modules that an option of conf/model leaves unquantized."""
    from omegaconf import OmegaConf

    written: Any = OmegaConf.load(conf_folder() / "model" / f"{option}.yaml")
    return tuple(written.get("skip_modules", ()))
