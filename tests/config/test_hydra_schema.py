"""Schemas are what Hydra may override: the dataclasses without their frozenness and their checks."""

import dataclasses

import pytest
from omegaconf import OmegaConf

from qexp.config.dataclass_io import from_plain
from qexp.config.hydra_schema import schema_of


@dataclasses.dataclass(frozen=True)
class Inner:
    names: tuple[str, ...] = ("a",)


@dataclasses.dataclass(frozen=True)
class Outer:
    needed: int
    inner: Inner = dataclasses.field(default_factory=Inner)
    table: dict[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        raise AssertionError("a schema must not run the checks of its dataclass")


def test_a_schema_is_an_unfrozen_twin_without_checks() -> None:
    schema = OmegaConf.structured(schema_of(Outer))
    assert OmegaConf.is_missing(schema, "needed")
    schema.needed, schema.inner.names, schema.table = 3, ["b", "c"], {"x": 1}
    assert OmegaConf.to_container(schema) == {"needed": 3, "inner": {"names": ["b", "c"]}, "table": {"x": 1.0}}
    with pytest.raises(AssertionError, match="must not run"):
        from_plain(Outer, {"needed": 3})
