"""No quantization: weights are loaded in the compute dtype. The reference runs through this backend."""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import override

from qexp.quantizers import base
from qexp.quantizers.configs import BackendConfig


@dataclass(frozen=True)
class NoneConfig(BackendConfig):
    quant_method: str = "none"

    @override
    def quantization_method(self) -> str | None:
        return None

    @override
    def is_quantizable(self) -> bool:
        return False


class NoneQuantizer(base.Quantizer):
    """Quantizes nothing; every hook keeps its default."""


Config = NoneConfig
Quantizer = NoneQuantizer
