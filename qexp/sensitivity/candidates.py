"""The weights of a format as a load would make them, in the place of the dense ones for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qexp.errors import ConfigError
from qexp.quantizers.rows import WeightSpec, is_finite
from qexp.sensitivity.groups import Format


def weight_of(model: nn.Module, layer: str) -> Tensor:
    """Return the weight that a layer computes with now."""
    weight = model.get_submodule(layer)._parameters["weight"]
    assert weight is not None
    return weight


def candidate_weight(weight: Tensor, layer: str, one: Format) -> Tensor:
    """Return the weight that a layer has in a format, dequantized to fp32, in the layer's own layout.

    weight: dense. It is quantized from the dtype that a load quantizes from. Raises: ConfigError for one that is not
    finite.
    """
    spec = one.chosen[layer]
    restored = restored_rows(weight.t() if spec.transposed else weight, spec, one)
    return restored.t().contiguous() if spec.transposed else restored


def restored_rows(dense: Tensor, spec: WeightSpec, one: Format) -> Tensor:
    """Quantize rows of a dense weight, [out, in] as `spec` has it, and dequantize them to fp32.

    Rows are a part of the weight only in a format whose `rows_alone` is true. Raises: as `candidate_weight`.
    """
    own = replace(spec, shape=(dense.shape[0], dense.shape[1]))
    with torch.no_grad():
        source = dense.to(spec.dtype).contiguous()
        quantized = one.quantizer.create_quantized_param(own, [source], {}, dense.device)
        restored = one.quantizer.dequantize_param(quantized, torch.float32)
    if not is_finite(restored):
        raise ConfigError(
            f"the weight of '{spec.module}' is not finite in {one.name}; leave it out of task.formats, or add "
            f"'{spec.module}' to skip_modules"
        )
    return restored


@contextmanager
def weights_in_place(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Have layers compute with other weights. An embedding that shares the dense one keeps it."""
    before: list[tuple[dict[str, Any], Any]] = []
    try:
        for layer, weight in weights.items():
            parameters = model.get_submodule(layer)._parameters
            before.append((parameters, parameters["weight"]))
            parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        yield
    finally:
        for parameters, weight in reversed(before):
            parameters["weight"] = weight
