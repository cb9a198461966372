"""Recognize linear layers: `nn.Linear`, and classes that compute exactly y = x Wᵀ + b.

transformers' `Conv1D` (GPT-2 and similar models) stores its weight transposed, [in, out]. It becomes an `nn.Linear`
before it is quantized, its weight is read transposed, and it is saved as [out, in], as transformers does for
bitsandbytes. `dequantize` restores the Conv1D.

A subclass of `nn.Linear` with an equivalent `forward` (transformers' `FalconLinear`) becomes an `nn.Linear`, too:
packed weights support `linear`, but not every product that a class may use.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from qexp.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

CONV1D = ("transformers.pytorch_utils", "Conv1D")
MARK = "_transposed_class"  # attribute of a linear layer that replaces a class with weight [in, out]: that class


def weight_shape(module: Any) -> tuple[int, int] | None:
    """Return [out, in] of a linear layer, recognized by class or by its computation; None for other layers."""
    from torch import nn

    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if is_transposed(module):
        return module.nf, module.nx
    return None


def linear_layers(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return [out, in] of each linear layer by name; a layer used twice has a tensor by either name."""
    modules = model.named_modules(remove_duplicate=False)
    return {name: shape for name, module in modules if (shape := weight_shape(module)) is not None}


def paths_above(name: str) -> Iterator[str]:
    """Yield the modules that a tensor may be of, the nearest first."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def is_transposed(module: Any) -> bool:
    """Return whether a layer is linear with a transposed weight, [in, out]."""
    return any((kind.__module__, kind.__name__) == CONV1D for kind in type(module).__mro__)


def computes_otherwise(module: Any) -> bool:
    """Return whether a subclass of nn.Linear computes something else, or its weight is used by another module."""
    from torch import nn

    from qexp.quantizers.linear_forward import is_linear_forward

    if is_transposed(module):
        own: Any = next(kind for kind in type(module).__mro__ if (kind.__module__, kind.__name__) == CONV1D)
        return type(module).forward is not own.forward
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return True
    is_linear = is_linear_forward(type(module))  # type: ignore[arg-type]
    return not (is_linear and module._parameters.keys() <= {"weight", "bias"})


def to_linear(module: Any) -> nn.Linear:
    """Return an equivalent `nn.Linear` on meta for a linear layer of another class."""
    from torch import nn

    out_features, in_features = weight_shape(module) or (0, 0)
    layer = nn.Linear(in_features, out_features, bias=module.bias is not None, device="meta")
    return layer.requires_grad_(False).train(module.training)


def to_transposed(kind: Any, weight: Tensor, bias: Tensor) -> nn.Module:
    """Build a layer of a class with a transposed weight. weight: [out, in]."""
    import torch
    from torch import nn

    with torch.device("meta"):
        layer: Any = kind(weight.shape[0], weight.shape[1])
    layer.weight = nn.Parameter(weight.t().contiguous(), requires_grad=False)
    layer.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=False)
    return layer


def dense_linear(module: nn.Module, weight: Tensor) -> nn.Module:
    """Build a linear layer from a dense weight and the bias of `module`, in the network's original class."""
    import torch
    from torch import nn

    if (kind := vars(module).get(MARK)) is not None:
        return to_transposed(kind, weight, module.bias).train(module.training)  # type: ignore[arg-type]
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if isinstance(module.bias, torch.Tensor):
        linear.bias = nn.Parameter(module.bias.to(weight.dtype), requires_grad=False)
    return linear.train(module.training)


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Replace the submodule with the dotted name `name` by `new`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def refuse_without_weights(model: nn.Module) -> None:
    """Raise ConfigError if another library's hooks hold weights of the model, which are then on meta."""
    from qexp.offloading.payload import leaves, sites

    for name, module in model.named_modules():
        if any(leaf.is_meta for store, key in sites(module) for leaf in leaves(store[key])):
            raise ConfigError(
                f"dequantize: weights of '{name or type(model).__name__}' are held by another library's hooks; remove "
                "them first, as accelerate.hooks.remove_hook_from_module(model, recurse=True) does"
            )
