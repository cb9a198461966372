"""The settings of the bitsandbytes backend, under upstream's names."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from typing_extensions import override

from qexp.errors import ConfigError, choices
from qexp.quantizers.bitsandbytes_support import stored
from qexp.quantizers.configs import BackendConfig

QUANT_STORAGES = ("uint8", "int8", "float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class BitsAndBytesConfig(BackendConfig):
    """Upstream's fields and defaults, and one that only the library has, under the library's name.

    bnb_4bit_compute_dtype: null is the run's compute dtype; bnb_4bit_blocksize: 4-bit weights that share an absmax.
    """

    quant_method: str = "bitsandbytes"
    load_in_8bit: bool = False
    load_in_4bit: bool = False
    llm_int8_threshold: float = 6.0
    llm_int8_skip_modules: tuple[str, ...] = ()
    llm_int8_enable_fp32_cpu_offload: bool = False
    llm_int8_has_fp16_weight: bool = False
    bnb_4bit_compute_dtype: str | None = None
    bnb_4bit_quant_type: str = "fp4"
    bnb_4bit_use_double_quant: bool = False
    bnb_4bit_quant_storage: str = "uint8"
    bnb_4bit_blocksize: int = 64

    skip_field: ClassVar[str] = "llm_int8_skip_modules"
    also_read: ClassVar[Mapping[str, str]] = {"_load_in_4bit": "load_in_4bit", "_load_in_8bit": "load_in_8bit"}

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.load_in_8bit and self.load_in_4bit:
            raise ConfigError("backend.load_in_8bit and backend.load_in_4bit are both true; choose one")
        if self.bnb_4bit_quant_type not in stored.TYPES_4BIT:
            raise ConfigError(
                f"backend.bnb_4bit_quant_type={self.bnb_4bit_quant_type!r} is unknown; use {choices(stored.TYPES_4BIT)}"
            )
        if self.bnb_4bit_quant_storage not in QUANT_STORAGES:
            storage = f"backend.bnb_4bit_quant_storage={self.bnb_4bit_quant_storage!r}"
            raise ConfigError(f"{storage} is unknown; use {choices(QUANT_STORAGES)}")
        if self.bnb_4bit_blocksize not in stored.BLOCK_SIZES:
            size = f"backend.bnb_4bit_blocksize={self.bnb_4bit_blocksize}"
            raise ConfigError(f"{size} is not supported by bitsandbytes; use {choices(stored.BLOCK_SIZES)}")
        if self.llm_int8_threshold < 0:
            raise ConfigError(f"backend.llm_int8_threshold={self.llm_int8_threshold} must be 0 or more")

    @override
    def check_as_rule(self) -> None:
        super().check_as_rule()
        if self.llm_int8_enable_fp32_cpu_offload:
            raise ConfigError("llm_int8_enable_fp32_cpu_offload is for a whole model; set it to false")

    @override
    def quantizes_activations(self) -> bool:
        return self.load_in_8bit  # LLM.int8: arXiv:2208.07339

    def ignored_fields(self) -> set[str]:
        """Return the fields without effect on this configuration, which are left out of the run key."""
        if self.load_in_4bit:
            return {"llm_int8_threshold"}
        return {item.name for item in fields(self) if item.name.startswith("bnb_4bit_")}

    @override
    def to_dict(self) -> dict[str, Any]:
        """Return upstream's form: the load flags under both names, and always a compute dtype.

        The block size, which upstream does not name, is included only if it is not the default: quant states store it.
        """
        values = super().to_dict()
        values |= {"_load_in_4bit": self.load_in_4bit, "_load_in_8bit": self.load_in_8bit}
        values["bnb_4bit_compute_dtype"] = self.bnb_4bit_compute_dtype or "float32"
        if self.bnb_4bit_blocksize == type(self).bnb_4bit_blocksize:
            del values["bnb_4bit_blocksize"]
        return values

    @classmethod
    @override
    def types(cls) -> list[dict[str, Any]]:
        doubled = itertools.product(stored.TYPES_4BIT, (False, True))
        return [
            {"load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": double}
            for kind, double in doubled
        ]

    @override
    def describe(self) -> str | None:
        if self.load_in_8bit:
            return "llm.int8"
        return self.bnb_4bit_quant_type + ("+dq" if self.bnb_4bit_use_double_quant else "")

    @override
    def quantization_method(self) -> str | None:
        if self.load_in_8bit:
            return "llm_int8"
        return self.bnb_4bit_quant_type if self.load_in_4bit else None

    @override
    def is_quantizable(self) -> bool:
        return self.load_in_8bit or self.load_in_4bit
