"""Read a run's config.yaml back into a RunConfig."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qexp.config.dataclass_io import from_plain
from qexp.config.plugins import plugin_config
from qexp.config.schema import ComponentConfig, RunConfig


def run_config_from_container(container: Mapping[str, Any]) -> RunConfig:
    """Read back what `RunConfig.to_container` wrote; nothing is resolved again.

    Raises: ConfigError if the container has other fields than this version writes.
    """
    values = {"save": {}, **container}  # what was stored before there was such a setting had none
    for group in ("model", "task"):
        values[group] = plugin_config(group, values.get(group), group)
    components = {
        name: from_plain(ComponentConfig, component, f"components.{name}")
        for name, component in values.get("components", {}).items()
    }
    values["components"] = {
        name: replace(component, backend=plugin_config("backend", component.backend, f"components.{name}.backend"))
        for name, component in components.items()
    }
    config: RunConfig = from_plain(RunConfig, values)
    return config
