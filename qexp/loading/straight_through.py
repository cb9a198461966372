"""A backward pass for quantized layers whose library has none.

A kernel that quantizes its input on the way (torchao's int8dq) returns a tensor without history: what was computed
before it would be trained with part of its gradient, or none, and nobody would be told. Such a layer gets the
straight-through gradient: that of x W^T + b with the dequantized W, as if rounding the input had not happened.

Source: arXiv:1308.3432 (straight-through estimator).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qexp.quantizers.base import Quantizer


def give_backward(model: nn.Module, quantizer: Quantizer) -> None:
    """Hook every quantized layer; where the library has recorded a history after all, the hook changes nothing."""
    for module in model.modules():
        if quantizer.is_quantized(module):
            module.register_forward_hook(partial(_with_history, quantizer), with_kwargs=True)


def _with_history(quantizer: Quantizer, layer: Any, arguments: Any, keywords: Any, output: Tensor) -> Tensor | None:
    if not torch.is_grad_enabled() or output.requires_grad:
        return None
    input = arguments[0] if arguments else keywords["input"]
    if not input.requires_grad and (layer.bias is None or not layer.bias.requires_grad):
        return None
    return _StraightThrough.apply(input, layer.bias, output, layer, quantizer)


class _StraightThrough(torch.autograd.Function):
    """output, with the gradient that a dense layer [out, in] would pass on."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, bias: Tensor | None, output: Tensor, layer: nn.Module, quantizer: Quantizer
    ) -> Tensor:
        ctx.layer, ctx.quantizer = layer, quantizer
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        to_input = to_bias = None
        if ctx.needs_input_grad[0]:
            dense = ctx.quantizer.dequantize_param(ctx.layer.weight, gradient.dtype)
            to_input = gradient @ dense.to(gradient.device)  # the weight may rest elsewhere by now
        if ctx.needs_input_grad[1]:
            to_bias = gradient.reshape(-1, gradient.shape[-1]).sum(dim=0)
        return to_input, to_bias, None, None, None
