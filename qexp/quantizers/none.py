"""No quantization: weights are loaded in the compute dtype. The reference runs through this backend."""

from __future__ import annotations

from dataclasses import dataclass

from qexp.quantizers import base


@dataclass(frozen=True)
class NoneConfig:
    quant_method: str = "none"
    label: str | None = None


class NoneQuantizer(base.Quantizer):
    """Quantizes nothing; every hook keeps its default."""


Config = NoneConfig
Quantizer = NoneQuantizer
