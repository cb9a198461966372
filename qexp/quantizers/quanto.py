"""optimum-quanto: int8, int4, int2 and float8 weights."""

from __future__ import annotations

from dataclasses import dataclass

from qexp.errors import ConfigError, choices

WEIGHTS_DTYPES = ("int8", "int4", "int2", "float8")


@dataclass(frozen=True)
class QuantoConfig:
    quant_method: str = "quanto"
    label: str | None = None
    weights_dtype: str = "int8"
    modules_to_not_convert: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.weights_dtype not in WEIGHTS_DTYPES:
            raise ConfigError(f"backend.weights_dtype={self.weights_dtype!r} is unknown; use {choices(WEIGHTS_DTYPES)}")


Config = QuantoConfig
