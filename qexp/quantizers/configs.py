"""The base class of backend configs: upstream's `quantization_config`, as a dict and as JSON.

A backend's config is a frozen dataclass derived from this one. Its dict has upstream's field names: dtypes are bare
names ("bfloat16"), tuples are lists, an empty tuple is null (upstream's default), and qexp's own `label` is left out.
`from_dict` reads the dicts and config objects of diffusers and transformers: dtypes and enums as values,
`_load_in_4bit` beside `load_in_4bit`, keys that only one of the two has.

This module imports no torch.
"""

from __future__ import annotations

import json
import logging
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import Any, ClassVar, Self

from qexp.config.dataclass_io import check_finite, field_types, from_plain
from qexp.errors import ConfigError, choices, did_you_mean

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}  # short name -> torch's
NO_FIELDS = ("quant_method", "label")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BackendConfig:
    """quant_method: the backend's name, that of its file; label: the configuration's name in tables."""

    quant_method: str = ""
    label: str | None = None

    skip_field: ClassVar[str] = "modules_to_not_convert"  # the field with layers to leave alone
    also_read: ClassVar[Mapping[str, str]] = {}  # other keys that upstream's dicts have -> field

    def __post_init__(self) -> None:
        for item in fields(self):
            check_finite(getattr(self, item.name), f"backend.{item.name}")
            if item.name.endswith("compute_dtype"):
                object.__setattr__(self, item.name, compute_dtype(getattr(self, item.name), f"backend.{item.name}"))

    def to_dict(self) -> dict[str, Any]:
        """Return the `quantization_config` of a config.json, with every field."""
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "label"}
        return {name: (list(value) or None) if isinstance(value, tuple) else value for name, value in values.items()}

    def to_diff_dict(self) -> dict[str, Any]:
        """Return `to_dict` without fields at their defaults."""
        default = type(self)().to_dict()
        return {name: value for name, value in self.to_dict().items() if name not in default or value != default[name]}

    def to_json_string(self, use_diff: bool = True) -> str:
        """Return indented, sorted JSON of `to_diff_dict` or `to_dict`."""
        return json.dumps(self.to_diff_dict() if use_diff else self.to_dict(), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build the config from upstream's dict; unknown keys are named in a warning, as upstream does.

        Raises: ConfigError for a value of the wrong type, or an unsupported one.
        """
        kind: Any = cls
        hints, known, unknown = field_types(kind), dict[str, Any](), list[str]()
        # the field's own name wins
        for key, value in sorted(values.items(), key=lambda item: item[0] in cls.also_read):
            name = cls.also_read.get(key, key)
            if name not in hints:
                unknown += [] if key.startswith("_") else [key]
            elif name not in NO_FIELDS and (value is not None or _takes_null(hints[name])):
                known.setdefault(name, plain(value))
        if unknown:
            logger.warning("quantization_config: %s not known to this backend, and unused", ", ".join(sorted(unknown)))
        config: Self = from_plain(kind, known, "quantization_config")
        return replace(config, label=config.describe())

    @classmethod
    def types(cls) -> list[dict[str, Any]]:
        """Return the fields of every type of this backend, for tables: [{"quant_type": "Q8_0"}, …]."""
        return []

    def describe(self) -> str | None:
        """Return a label for a checkpoint's config, which stores none."""
        return None

    def resolved(self, device_type: str) -> BackendConfig:
        """Return the config that runs on a device of this type: another backend's if this one cannot."""
        return self

    def check_as_rule(self) -> None:
        """Raise ConfigError for settings of a whole model, which a recipe's rule cannot have."""
        if names := getattr(self, self.skip_field, ()):
            raise ConfigError(
                f"{self.skip_field}={list(names)} is for a whole model; put a rule with backend: none before this one"
            )

    def quantizes_activations(self) -> bool:
        """Return whether layers quantize their input, too, so that what they cost is not in their weights alone."""
        return False

    def missing(self) -> str | None:
        """Return the message for a required field that is not set; None if the config is complete."""
        return None

    def methods(self) -> tuple[str, ...]:
        """Return the backends that quantize with this config."""
        return (self.quant_method,)

    def quantization_method(self) -> str | None:
        """Return the kind of quantization, or None."""
        return self.quant_method

    def is_quantizable(self) -> bool:
        """Return whether anything would be quantized."""
        return True


def compute_dtype(value: Any, place: str) -> str | None:
    """Return torch's bare name of a compute dtype: from "bf16", "torch.bfloat16" or the dtype. Raises ConfigError."""
    name = plain(value)
    dtype = DTYPES.get(name, name)
    if dtype is not None and dtype not in DTYPES.values():
        names = [*DTYPES, *DTYPES.values()]
        raise ConfigError(f"{place}={name} is not a compute dtype{did_you_mean(name, names)}; use {choices(names)}")
    return dtype


def plain(value: Any) -> Any:
    """Convert a value of upstream's config object to its JSON form: enums by value, dtypes by bare name."""
    value = value.value if isinstance(value, Enum) else value
    if type(value).__module__ == "torch" or isinstance(value, str):
        return str(value).removeprefix("torch.")
    return value


def _takes_null(hint: Any) -> bool:
    return hint is Any or type(None) in typing.get_args(hint)
