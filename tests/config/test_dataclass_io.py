"""Values of settings on their way into dataclasses: what no JSON holds is refused where it is converted."""

import dataclasses
import math
from typing import Any

import pytest

from qexp.config.dataclass_io import field_types, from_plain
from qexp.config.plugins import PLUGINS, plugin_module, plugin_names
from qexp.config.schema import TopLevelConfig
from qexp.errors import ConfigError
from qexp.quantizers.configs import BackendConfig

CONFIGS = [TopLevelConfig] + [plugin_module(group, name).Config for group in PLUGINS for name in plugin_names(group)]
FLOATS = [
    (config, name)
    for config in CONFIGS
    for name, hint in field_types(config).items()
    if hint is float or hint == float | None
]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("config", "name"), FLOATS, ids=lambda item: getattr(item, "__name__", item))
def test_no_number_of_any_setting_may_be_infinite_or_nan(config: Any, name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"^here\.{name}={value} must be a finite number; give one"):
        from_plain(config, {name: value}, "here")


def test_every_group_of_numbers_is_looked_at() -> None:
    assert {"llm_int8_threshold", "guidance_scale", "temperature"} <= {name for _, name in FLOATS}


@pytest.mark.parametrize(
    ("values", "place"),
    [
        ({"isolation": {"timeout_minutes": math.inf}}, "isolation.timeout_minutes"),
        ({"save": {"max_shard_gib": math.nan}}, "save.max_shard_gib"),
        ({"task": {"pipeline_arguments": {"sigmas": [1.0, math.nan]}}}, r"task.pipeline_arguments.sigmas\[1\]"),
        ({"model": {"arguments": {"limit": -math.inf}}}, "model.arguments.limit"),
        ({"components": {"vae": {"backend": {"threshold": math.nan}}}}, "components.vae.backend.threshold"),
    ],
)
def test_a_number_at_any_depth_is_named_by_its_place(values: dict[str, Any], place: str) -> None:
    with pytest.raises(ConfigError, match=f"^{place}=-?(nan|inf) must be a finite number"):
        from_plain(TopLevelConfig, values)


def test_a_backend_made_in_python_is_checked_as_well() -> None:
    made = [plugin_module("backend", name).Config for name in plugin_names("backend")]
    numbers = [(kind, item.name) for kind in made for item in dataclasses.fields(kind) if item.type == "float"]
    assert numbers and all(issubclass(kind, BackendConfig) for kind, _ in numbers)
    for kind, name in numbers:
        with pytest.raises(ConfigError, match=f"backend.{name}=nan must be a finite number"):
            kind(**{name: math.nan})
