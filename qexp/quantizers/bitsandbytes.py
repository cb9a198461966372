"""bitsandbytes: NF4 and FP4 blockwise 4-bit weights, and LLM.int8 with its outlier threshold.

Fields carry the names and defaults of upstream's `BitsAndBytesConfig`. Sources: arXiv:2305.14314 (NF4, double
quantization), arXiv:2208.07339 (LLM.int8).
"""

from __future__ import annotations

from dataclasses import dataclass

from qexp.errors import ConfigError, choices

TYPES_4BIT = ("fp4", "nf4")


@dataclass(frozen=True)
class BitsAndBytesConfig:
    quant_method: str = "bitsandbytes"
    label: str | None = None
    load_in_8bit: bool = False
    load_in_4bit: bool = False
    llm_int8_threshold: float = 6.0
    llm_int8_skip_modules: tuple[str, ...] = ()
    bnb_4bit_compute_dtype: str | None = None
    bnb_4bit_quant_type: str = "fp4"
    bnb_4bit_use_double_quant: bool = False

    def __post_init__(self) -> None:
        if self.load_in_8bit and self.load_in_4bit:
            raise ConfigError("backend.load_in_8bit and backend.load_in_4bit are both true; choose one")
        if self.bnb_4bit_quant_type not in TYPES_4BIT:
            raise ConfigError(
                f"backend.bnb_4bit_quant_type={self.bnb_4bit_quant_type!r} is unknown; use {choices(TYPES_4BIT)}"
            )
        if self.llm_int8_threshold < 0:
            raise ConfigError(f"backend.llm_int8_threshold={self.llm_int8_threshold} must be 0 or more")


Config = BitsAndBytesConfig
