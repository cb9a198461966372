"""LoRA on a layer: y = W x + scale · B (A x), computed beside a weight W that may be quantized.

Source: arXiv:2106.09685 (LoRA).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@dataclass(frozen=True)
class Update:
    """One layer's: down is A [rank, in, ...], up is B [out, rank, ...]; of convolutions with the kernel's size."""

    down: Tensor
    up: Tensor
    bias: Tensor | None
    scale: float

    def to(self, place: torch.dtype | torch.device) -> Update:
        """Return the update in a dtype, or on a device."""
        bias = None if self.bias is None else self.bias.to(place)
        return replace(self, down=self.down.to(place), up=self.up.to(place), bias=bias)


def layer_sizes(layer: Any) -> tuple[int, int] | None:
    """(out, in) of a layer that LoRA can be applied to."""
    from torch import nn

    if isinstance(layer, nn.Conv2d) and layer.groups == 1:
        return layer.out_channels, layer.in_channels
    if hasattr(layer, "out_features") and hasattr(layer, "in_features"):  # linear layers, quantized ones too
        sizes: Any = layer.out_features, layer.in_features
        return int(sizes[0]), int(sizes[1])
    return None


def apply_updates(model: nn.Module, updates: Mapping[str, list[Update]], dtype: torch.dtype) -> None:
    """Hook the updates to the layers of a model. dtype: of the component, where it is not quantized."""
    for name, of_layer in updates.items():
        model.get_submodule(name).register_forward_hook(_Hook(of_layer, dtype))


class _Hook:
    """Adds the updates of a layer to its output; in the order of computation of peft, whose bits it gives."""

    def __init__(self, updates: list[Update], dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.updates = [update.to(dtype) for update in updates]

    def __call__(self, layer: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        (x, *_), result = arguments, output
        if self.updates[0].down.device != x.device:
            self.updates = [update.to(x.device) for update in self.updates]
        for update in self.updates:
            x = x.to(self.dtype)
            result = result + _low_rank(layer, update, x) * update.scale
        return result.to(output.dtype)


def _low_rank(layer: Any, update: Update, x: Tensor) -> Tensor:
    """B (A x); a convolution's A has its kernel, stride and padding, and its B looks at single pixels."""
    from torch.nn.functional import conv2d, linear

    if update.down.ndim == 2:
        return linear(linear(x, update.down), update.up, update.bias)
    inner = conv2d(x, update.down, None, layer.stride, layer.padding, layer.dilation)
    return conv2d(inner, update.up, update.bias)
