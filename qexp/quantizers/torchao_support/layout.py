"""Find by experiment how torchao's types store a weight, and which types run on this machine.

torchao documents neither. A weight on meta has the same inner tensors and costs no memory; if each of them grows in
proportion to the rows, a weight can be quantized in slices of rows. Whether a type runs is tested on a small layer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qexp.checkpoints.dtypes import TORCH_DTYPES
from qexp.errors import ConfigError, UnsupportedError
from qexp.quantizers.stored import FLOATS, Part
from qexp.quantizers.torchao_support.library import build, inner_tensors, is_quantized, quantize
from qexp.quantizers.torchao_support.names import SHORTHANDS
from qexp.quantizers.torchao_support.types import library_call

ROWS, COLUMNS = 64, 512  # of the test layer
DTYPES = (torch.bfloat16, torch.float32)
NEEDS = {  # requirements of a class that torchao's own message does not name
    "Float8DynamicActivationFloat8WeightConfig": "compute capability 8.9",
    "Int4WeightOnlyConfig": "a GPU of compute capability 8.0",
    "MXDynamicActivationMXWeightConfig": "compute capability 10.0",
    "NVFP4DynamicActivationNVFP4WeightConfig": "compute capability 10.0",
}
REFUSALS = (AssertionError, AttributeError, ImportError, NotImplementedError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class Layout:
    """The stored form of a weight.

    parts: inner tensor -> (shape, dtype). rows_multiple: slices must have a multiple of this many rows; None if only
    the whole weight can be quantized.
    """

    parts: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    rows_multiple: int | None

    @property
    def nbytes(self) -> int:
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.parts.values())


def layout_of(config: Any, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Layout | None:
    """Return the layout of a quantized weight [out, in]; None if torchao would leave it unquantized.

    Raises: ConfigError for a weight that torchao rejects.
    """
    rows, columns = shape
    for multiple in (1, 16):  # some kernels take only 16 rows at a time
        parts = _parts_of_slice(config, multiple, columns, dtype) if rows % multiple == 0 else None
        if parts is not None:
            return Layout(_repeat_rows(parts, rows // multiple), multiple)
    try:
        found = _try_parts(config, shape, dtype, torch.device("meta"))
    except REFUSALS:
        try:
            found = _try_parts(config, shape, dtype, device)  # what looks at the values cannot run on meta
        except REFUSALS as error:
            kind = str(dtype).removeprefix("torch.")
            raise ConfigError(
                f"torchao's {type(config).__name__} rejects a weight of shape {list(shape)} in {kind}: "
                f"{_first_line(error)}; add the layer to skip_modules, or use another compute_dtype"
            ) from None
    return None if found is None else Layout(found, None)


def stored_layout(config: Any, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Part]:
    """Return the parts that a file must have; {} for types that do not run here, which are checked when read."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, Float8WeightOnlyConfig

    if isinstance(config, Float8DynamicActivationFloat8WeightConfig):  # whose weights are the same, and made anywhere
        config = Float8WeightOnlyConfig(config.weight_dtype, granularity=config.granularity[1])
    try:
        layout = layout_of(config, shape, dtype, torch.device("cpu"))
    except ConfigError:
        return {}
    parts = {} if layout is None else layout.parts
    return {name: Part(_stored_dtypes(kind), (size,)) for name, (size, kind) in parts.items()}


def _stored_dtypes(dtype: torch.dtype) -> tuple[str, ...]:
    """Return the valid safetensors dtypes of a part; scales may have been saved in another compute dtype."""
    if dtype.is_floating_point and dtype.itemsize > 1:
        return FLOATS
    return tuple(name for name, known in TORCH_DTYPES.items() if known == dtype)


Parts = dict[str, tuple[tuple[int, ...], torch.dtype]]
_SLICES: dict[tuple[str, int, int, torch.dtype], Parts | None] = {}


def _try_parts(config: Any, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Parts | None:
    tensor = quantize(torch.ones(shape, dtype=dtype, device=device), config)
    if not is_quantized(tensor):
        return None
    return {name: (tuple(part.shape), part.dtype) for name, part in inner_tensors(tensor).items()}


def _parts_of_slice(config: Any, rows: int, columns: int, dtype: torch.dtype) -> Parts | None:
    """Return the inner tensors of a slice of `rows`, if they grow in proportion to the rows; else None.

    A try takes milliseconds, so what was found is kept: a model has layers of few widths, and a sweep loads it often.
    """
    from torchao.core.config import config_to_dict

    key = (json.dumps(config_to_dict(config), sort_keys=True), rows, columns, dtype)
    if key not in _SLICES:
        _SLICES[key] = _try_slices(config, rows, columns, dtype)
    return _SLICES[key]


def _try_slices(config: Any, rows: int, columns: int, dtype: torch.dtype) -> Parts | None:
    try:
        once, twice, thrice = (_try_parts(config, (n * rows, columns), dtype, torch.device("meta")) for n in (1, 2, 3))
    except REFUSALS:
        return None
    if once is None or not all(size for size, _ in once.values()):
        return None
    return once if (_repeat_rows(once, 2), _repeat_rows(once, 3)) == (twice, thrice) else None


def _repeat_rows(parts: Parts, count: int) -> Parts:
    return {name: ((count * size[0], *size[1:]), kind) for name, (size, kind) in parts.items()}


def check_machine(name: str, config: Any, device: torch.device) -> None:
    """Raise UnsupportedError unless layers of this config run on `device`. name: as the user typed it.

    Raises: ConfigError for a config with a useless result, such as weights of zeros.
    """
    reason = obstacle(config, device)
    if reason is None:
        return
    need = NEEDS.get(type(config).__name__)
    why = f"needs {need}; here: {_here(device)}" if need else f"does not run here, on {_here(device)}"
    raise UnsupportedError(
        f"backend.quant_type={name} {why} (torchao: {reason}). On this machine: {', '.join(running_types(device))}; "
        "through qexp_packed also int4wo, uint1wo … uint8wo and fpX_eAwB"
    )


def running_types(device: torch.device) -> list[str]:
    """Return torchao's shorthands that run on a device."""
    configs = {name: build(*library_call(name, {}, None)) for name in SHORTHANDS}
    return [name for name, config in configs.items() if obstacle(config, device) is None]


def obstacle(config: Any, device: torch.device) -> str | None:
    """Return torchao's error for quantizing and running a small layer, or None if it works."""
    reasons = []
    for dtype in DTYPES:
        try:
            _try_layer(config, dtype, device)
            return None
        except ConfigError:
            raise
        except REFUSALS as error:
            reasons.append(_first_line(error))
    return reasons[0]


def _try_layer(config: Any, dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    group_size = getattr(getattr(config, "granularity", config), "group_size", None)
    columns = math.lcm(COLUMNS, group_size if isinstance(group_size, int) else 1)
    dense = torch.randn(ROWS, columns, generator=generator).to(device=device, dtype=dtype)
    weight = quantize(dense, config)
    if not is_quantized(weight):
        raise ConfigError(
            f"backend.quant_type: torchao's {type(config).__name__} silently leaves a layer of {ROWS} x {columns} "
            "unquantized; use other quant_type_kwargs"
        )
    stored = sum(part.nbytes for part in inner_tensors(weight).values())
    if stored >= dense.nbytes:
        raise ConfigError(
            f"backend.quant_type: torchao's {type(config).__name__} needs {8 * stored / dense.numel():.1f} bits per "
            f"weight, and the unquantized weight {8 * dtype.itemsize}; use another type"
        )
    answer = torch.nn.functional.linear(dense[:2], weight)
    if not answer.any():
        raise ConfigError(
            f"backend.quant_type: torchao's {type(config).__name__} with these quant_type_kwargs sets every weight to "
            "zero; use uint1wo for one bit, or more bits"
        )


def check_runs(layer: Any, quant_type: str, device: torch.device) -> None:
    """Raise UnsupportedError for a layer of stored weights that does not run on `device`."""
    try:
        with torch.no_grad():
            layer(torch.ones(16, layer.weight.shape[1], dtype=layer.weight.dtype, device=device))
    except REFUSALS as error:
        raise UnsupportedError(
            f"the checkpoint holds {quant_type} weights, which do not run on {device}: {_first_line(error)}; "
            "use another machine, or dequantize it there and save it"
        ) from None


def _here(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"{device}, compute capability {major}.{minor}"


def _first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class if it has none."""
    return next(iter(str(error).strip().splitlines()), "").rstrip(".") or type(error).__name__
