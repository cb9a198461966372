"""What a run's config.yaml holds: settings that mean the same in any directory, and how they are read back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qexp.config.dataclass_io import from_plain
from qexp.config.plugins import plugin_config
from qexp.config.schema import ComponentConfig, RunConfig
from qexp.errors import ConfigError
from qexp.hub.download import hub_id


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """Return the same experiment, to be run from any directory: what it reads and saves, by absolute paths.

    Files behind @file were read before: their content is what is stored. `paths.outputs` is left as it is shown.
    """
    files = {name: absolute_path(str(path)) for name, path in config.task.input_files().items()}
    return replace(
        config,
        model=_with_absolute(config.model.with_paths(absolute_path), "path", "reference_path", may_be_of_hub=True),
        task=replace(config.task, **files),
        metrics=_with_absolute(_with_absolute(config.metrics, "clip_model", may_be_of_hub=True), "fid_images"),
        save=_with_absolute(config.save, "path"),
        loader=config.loader if config.loader.cache == "auto" else _with_absolute(config.loader, "cache"),
    )


def absolute_path(path: str) -> str:
    """Return a path by which the same file is found from any directory.

    Links are not followed: they may be meant to point elsewhere later, and name what tables call a model.
    """
    return str(Path(path).expanduser().absolute())


def _with_absolute(settings: Any, *names: str, may_be_of_hub: bool = False) -> Any:
    """Return settings with their paths in these fields made absolute.

    may_be_of_hub: a hub's user/name is left as it is.
    """
    paths = {name: path for name in names if (path := getattr(settings, name)) is not None}
    own = {name: path for name, path in paths.items() if not (may_be_of_hub and hub_id(path) is not None)}
    return replace(settings, **{name: absolute_path(path) for name, path in own.items()})


def run_config_from_container(container: Mapping[str, Any]) -> RunConfig:
    """Read back what `RunConfig.to_container` wrote; nothing is resolved again.

    Raises: ConfigError if the container has other fields than this version writes.
    """
    values = {"save": {}, **container}  # what was stored before there was such a setting had none
    for group in ("model", "task"):
        values[group] = plugin_config(group, values.get(group), group)
    if not isinstance(values.get("components"), Mapping):
        raise ConfigError(f"components={values.get('components')} must be a group of components")
    components = {
        name: from_plain(ComponentConfig, component, f"components.{name}")
        for name, component in values["components"].items()
    }
    values["components"] = {
        name: replace(component, backend=plugin_config("backend", component.backend, f"components.{name}.backend"))
        for name, component in components.items()
    }
    return from_plain(RunConfig, values)
