"""Configurations with the values of a test, without composing for each test: a composition takes 0.1 s, this 0.004 s.

Only options of groups (`task=roundtrip`) are composed, once for all tests of a process that choose the same ones.
Values (`seed=3`) are assigned to a copy, by the function with which Hydra assigns them after it has composed.
"""

from collections.abc import Sequence
from copy import deepcopy
from functools import cache
from typing import Any

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from qexp.config.hydra_schema import compose_settings
from qexp.config.schema import RunConfig
from qexp.config.yaml_options import group_names
from qexp.experiments.resolve import to_run_config
from tests.composing import composed


def assigned(*overrides: str) -> DictConfig:
    """Return what `composed` returns, as a copy that the caller may change."""
    parsed = OverridesParser.create().parse_overrides([*overrides])
    cfg = deepcopy(_compose_options(*(one.input_line for one in parsed if _chooses_option(one))))
    ConfigLoaderImpl._apply_overrides_to_config([one for one in parsed if not _chooses_option(one)], cfg)
    return cfg


def run_config(*overrides: str) -> RunConfig:
    return to_run_config(assigned(*overrides))


@pytest.fixture
def commands_assign(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `fit` and `predict` take what `assigned` returns: the name of the sweep alone is another."""

    def settings(overrides: Sequence[str], *, with_hydra: bool = False) -> Any:
        return compose_settings(overrides, with_hydra=True) if with_hydra else assigned(*overrides)

    for module in ("predict.__main__", "fit.opened", "fit.scores", "fit.proof"):
        monkeypatch.setattr(f"qexp.{module}.compose_settings", settings)


@cache
def _compose_options(*options: str | None) -> DictConfig:
    return composed(*filter(None, options))


def _chooses_option(override: Override) -> bool:
    return override.key_or_group in _groups() and not isinstance(override.value(), dict)


@cache
def _groups() -> frozenset[str]:
    return frozenset(group_names())
