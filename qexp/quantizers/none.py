"""No quantization: weights are loaded in the compute dtype. The reference runs through this backend."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NoneConfig:
    quant_method: str = "none"
    label: str | None = None


Config = NoneConfig
