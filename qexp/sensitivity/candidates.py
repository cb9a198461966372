"""The weights of a format as a load would make them, in the place of the dense ones for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qexp.errors import ConfigError
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
    with torch.no_grad():
        dense = (weight.t() if spec.transposed else weight).to(spec.dtype)
        quantized = one.quantizer.create_quantized_param(spec, [dense.contiguous()], {}, weight.device)
        restored = one.quantizer.dequantize_param(quantized, torch.float32)
        if not bool(torch.isfinite(restored).all()):
            raise ConfigError(
                f"the weight of '{layer}' is not finite in {one.name}; leave it out of task.formats, or add '{layer}' "
                "to skip_modules"
            )
        return restored.t().contiguous() if spec.transposed else restored


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
