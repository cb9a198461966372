"""The description that bitsandbytes stores beside a 4-bit weight, and whether it is that of the weight.

`X.weight.quant_state.bitsandbytes__nf4` is JSON as bytes: {quant_type, blocksize, dtype, shape}, and with double
quantization {nested_blocksize, nested_dtype, nested_offset} too. The library believes every word of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qexp.errors import LoadError
from qexp.quantizers.stored import REMEDY

if TYPE_CHECKING:
    from torch import Tensor

    from qexp.quantizers.base import WeightSpec

PREFIX = "quant_state.bitsandbytes__"
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = ("float32", "float16", "bfloat16")


def check_state(spec: WeightSpec, companions: Mapping[str, Tensor], quant_type: str) -> None:
    """Raises LoadError for a description that does not fit the weight, its other parts or the checkpoint's config."""
    (key,) = [name for name in companions if name.startswith(PREFIX)]
    place = f"'{spec.module}.weight.{key}'"
    try:
        state = json.loads(bytes(companions[key].tolist()))
    except (ValueError, TypeError, RecursionError) as error:
        raise LoadError(f"{place} is not JSON ({error}); {REMEDY}") from None
    if not isinstance(state, dict):
        raise LoadError(f"{place} is no JSON object; {REMEDY}")
    expected = _expected(spec, companions, quant_type, key)
    for name, (rule, holds) in expected.items():
        if not holds(state.get(name)):
            raise LoadError(f"{place} has {name}={str(state.get(name))[:80]!r}, which must be {rule}; {REMEDY}")
    _check_counts(spec, companions, state)


def _expected(spec: WeightSpec, companions: Mapping[str, Tensor], quant_type: str, key: str) -> dict[str, Any]:
    """Field -> (what it must be, in words; whether a value is that)."""
    kind, shape = key.removeprefix(PREFIX), list(spec.shape)
    fields = {
        "quant_type": (f"{kind}, as config.json has it", lambda value: value == kind == quant_type),
        "blocksize": ("a power of two from 32 to 4096", lambda value: type(value) is int and value in BLOCK_SIZES),
        "dtype": (f"one of {', '.join(DTYPES)}", lambda value: value in DTYPES),
        "shape": (f"{shape}, as the model has it", lambda value: value == shape),
    }
    if "nested_absmax" in companions:
        fields |= {
            "nested_blocksize": (
                "a power of two up to 4096",
                lambda value: type(value) is int and value in BLOCK_SIZES,
            ),
            "nested_dtype": ("float32", lambda value: value == "float32"),
            "nested_offset": ("a number", lambda value: type(value) in (int, float) and math.isfinite(value)),
        }
    return fields


def _check_counts(spec: WeightSpec, companions: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    counts = {"absmax": math.ceil(spec.numel / state["blocksize"])}
    if "nested_absmax" in companions:
        counts["nested_absmax"] = math.ceil(counts["absmax"] / state["nested_blocksize"])
    for name, count in counts.items():
        if companions[name].shape != (count,):
            raise LoadError(
                f"'{spec.module}.weight.{name}' has shape {list(companions[name].shape)}, but {list(spec.shape)} "
                f"weights have {count} of them; {REMEDY}"
            )
