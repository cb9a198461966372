"""Recipes of a mix, and the overrides that load it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from qexp.cli.quoting import quoted
from qexp.config.backend_options import backend_of
from qexp.config.plugins import plugin_config
from qexp.config.yaml_options import option_names
from qexp.errors import QexpError
from qexp.fit.layers import ModelLayers
from qexp.fit.mix import Mix, key_of, rules_of
from qexp.quantizers.base import have_one_config
from qexp.sensitivity.table import DENSE
from qexp.system.files import to_yaml, write_text

PLAIN = re.compile(r"[A-Za-z0-9_/+.@:-]+")


def backend_overrides(mix: Mix, model: ModelLayers, folder: Path, name: str) -> list[str]:
    """Write the recipes of a mix into a folder; returns the overrides that load it.

    A mix of one format that an option of conf/backend has, on every layer that it can hold, is that option.
    """
    overrides: list[str] = []
    for number, component in enumerate(model.components):
        option = _option_of(mix, model, component)
        path = folder / f"{name}.yaml" if len(model.components) == 1 else folder / f"{name}_{component}.yaml"
        group, field = ("backend", "backend")
        if number > 0:
            group, field = f"+backend@components.{component}.backend", f"components.{component}.backend"
        if option is not None:
            overrides.append(f"{group}={option}")
            continue
        recipe = {"name": name, "rules": rules_of(mix, component)}
        write_text(path, to_yaml(recipe, width=110))
        overrides += [f"{group}=mixed", hydra_override(f"{field}.recipe", f"@{path}")]
    return overrides


def place_overrides(mix: Mix, device: str, several: bool) -> list[str]:
    """Return the overrides that put what travels where it rests: the CPU, or the disk where the CPU computes.

    several: whether the model has several components, whose names stand before those of layers.
    """
    if not mix.away:
        return []
    rest, main = ("disk", "cpu") if device == "cpu" else ("cpu", device.partition(":")[2] or "0")
    away = [choice for choice in mix.choices if key_of(choice) in mix.away]
    names = [f"{choice.component}.{layer}" if several else layer for choice in away for layer in choice.layers]
    places = ", ".join([f"*: {main}", *(f"{name}: {rest}" for name in names)])
    return [*(["device=cpu"] if device == "cpu" else []), f"device_map={{{places}}}"]


def config_of(fields: Mapping[str, Any], place: str) -> Any:
    """Return the config of a backend's fields. Raises: ConfigError for fields that it has not."""
    return plugin_config("backend", dict(fields), place)


def _option_of(mix: Mix, model: ModelLayers, component: str) -> str | None:
    """Return the option of conf/backend that gives a component the same; None if there is none."""
    own = [choice for choice in mix.choices if choice.component == component and choice.format != DENSE]
    if not own:
        return DENSE
    if len({choice.format for choice in own}) > 1:
        return None
    whole = model.components[component].formats[own[0].format]
    covered = {layer for choice in own for layer in choice.layers}
    if covered != whole.nbytes.keys() or whole.refuses_model:
        return None
    config = config_of(own[0].backend, "backend")
    return next((option for option in option_names("backend") if _is_option(option, config)), None)


def _is_option(option: str, config: Any) -> bool:
    found = _config_of_option(option)
    return found is not None and found.quant_method == config.quant_method and have_one_config([found, config])


@cache  # every mix of a front is compared with every option, and reading one takes milliseconds
def _config_of_option(option: str) -> Any:
    """Return None for an option that needs more fields, as mixed does."""
    try:
        return backend_of(option)
    except QexpError:
        return None


def hydra_override(name: str, text: str) -> str:
    """`name=text` as Hydra reads it, its value in quotes where it has other characters than plain words."""
    return f"{name}={text}" if PLAIN.fullmatch(text) else shlex.split(quoted(f"{name}={text}"))[0]


def shell_line(overrides: Sequence[str]) -> str:
    """Return the command that runs an experiment with these overrides, to copy into a shell."""
    return f"python -m qexp {shlex.join(overrides)}"
