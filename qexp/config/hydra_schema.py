"""Generate Hydra's schemas from the frozen dataclasses.

A frozen structured config cannot be overridden, so each dataclass gets an unfrozen copy without its checks. The copies
are stored as `schema/...`, which the files in `conf/` inherit.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import MISSING, Field, field, fields, is_dataclass, make_dataclass
from functools import cache
from typing import Any

from qexp.config.dataclass_io import field_types
from qexp.config.plugins import PLUGINS, plugin_module, plugin_names
from qexp.config.schema import TopLevelConfig
from qexp.config.yaml_options import conf_folder

_stored: dict[tuple[str, str], type] = {}  # (group, name) -> what Hydra's store, of which there is one, has


@cache
def schema_of(cls: type) -> type:
    """Return an unfrozen copy of a dataclass: the same names, resolved types and defaults, tuples as lists."""
    types = field_types(cls)
    twin = [(item.name, _twin_type(types[item.name]), _default(item, types[item.name])) for item in fields(cls)]
    return make_dataclass(cls.__name__, twin)


def register_schemas() -> None:
    """Store the top-level schema and one for every plugin, and have YAML read fast. Idempotent."""
    from hydra.core.config_store import ConfigStore

    from qexp.config.libyaml import read_by_libyaml

    read_by_libyaml()
    configs = {("schema", "config"): TopLevelConfig}
    configs |= {
        (f"schema/{group}", name): plugin_module(group, name).Config
        for group in PLUGINS
        for name in plugin_names(group)
    }
    store = ConfigStore.instance()
    # Hydra copies its list of sources for each composition, and with it the store, of which there is one: a quarter of
    # the time. What it takes from the store it copies once more.
    vars(store)["__deepcopy__"] = lambda memo: store
    for (group, name), config in configs.items():
        twin = schema_of(config)
        if _stored.get((group, name)) is not twin:  # each takes a millisecond, and one process may compose often
            store.store(group=group, name=name, node=twin, package="_global_" if group == "schema" else None)
            _stored[group, name] = twin


def compose_settings(overrides: Sequence[str], *, with_hydra: bool = False) -> Any:
    """Compose the configuration of a command line without running it. with_hydra: include Hydra's own node.

    Raises: Hydra's errors; cli/hydra_errors.py explains them.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    register_schemas()
    folder, running = str(conf_folder().resolve()), GlobalHydra.instance()
    paths = running.config_loader().get_search_path().get_path() if running.is_initialized() else []
    # within our own command line, but not within another program of Hydra's, whose configuration is another one
    is_within = any(str(one.path).removeprefix("file://") == folder for one in paths)
    with nullcontext() if is_within else initialize_config_dir(folder, version_base="1.3", job_name="qexp"):
        return compose("config", overrides=list(overrides), return_hydra_config=with_hydra)


def _twin_type(hint: Any) -> Any:
    return schema_of(hint) if is_dataclass(hint) and isinstance(hint, type) else hint


def _default(item: Field[Any], hint: Any) -> Any:
    if is_dataclass(hint) and isinstance(hint, type):
        return field(default_factory=schema_of(hint))
    if item.default_factory is not MISSING:
        return field(default_factory=item.default_factory)
    if item.default is MISSING:
        return field(default="???")
    if isinstance(item.default, tuple):
        values = list(item.default)
        return field(default_factory=lambda: list(values))
    return field(default=item.default)
