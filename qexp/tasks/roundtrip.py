"""Quantize and dequantize every layer on its own and compare it with the weight in the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RoundtripConfig:
    name: str = "roundtrip"


Config = RoundtripConfig
