"""Configurations that tests assign are those that Hydra composes."""

import pytest
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from tests.assigning import assigned
from tests.composing import composed

OPTIONS = ("task=roundtrip", "+backend@components.transformer.backend=quanto_int4")
VALUES = ("seed=3", "skip_modules=[a,'b,c']", "+components.transformer.compute_dtype=bf16", "model.path=/x/${seed}",
          "~save", "++metrics={names: [ssim]}", "device_map={a: 0, b: cpu}")  # fmt: skip


def test_assigned_configuration_is_the_composed_one() -> None:
    for _ in range(2):  # the second time, options are not composed
        found = assigned(*VALUES[:3], *OPTIONS, *VALUES[3:])
        expected = composed(*VALUES[:3], *OPTIONS, *VALUES[3:])
        assert OmegaConf.to_container(found) == OmegaConf.to_container(expected)
        assert OmegaConf.get_type(found.loader) is OmegaConf.get_type(expected.loader)
        found.seed = 4  # of a copy


def test_mistakes_are_those_of_hydra() -> None:
    for override in ("sede=3", "seed=abc", "components.transformer.compute_dtype=bf16"):
        with pytest.raises(ConfigCompositionException) as found:
            assigned(override)
        with pytest.raises(ConfigCompositionException) as expected:
            composed(override)
        assert str(found.value) == str(expected.value)
