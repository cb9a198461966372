"""torchao: int8 and float8 weights as tensor subclasses on ordinary linear layers."""

from __future__ import annotations

from dataclasses import dataclass

from qexp.errors import ConfigError, choices

QUANT_TYPES = ("int8wo", "int8dq", "float8wo", "float8wo_e4m3", "float8wo_e5m2")


@dataclass(frozen=True)
class TorchAoConfig:
    quant_method: str = "torchao"
    label: str | None = None
    quant_type: str = "int8wo"
    modules_to_not_convert: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.quant_type not in QUANT_TYPES:
            raise ConfigError(f"backend.quant_type={self.quant_type!r} is unknown; use {choices(QUANT_TYPES)}")


Config = TorchAoConfig
