"""Blocks that keep their inputs alone in the forward pass, and are computed again in the backward pass.

torch.utils.checkpoint does the same, but knows nothing of weights that travel: those of an offloaded block have to stay
on the device until its gradients are there, which is after its forward has ended.

Source: arXiv:1604.00556.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from typing_extensions import override

from qexp.offloading.strategies import offload_of
from qexp.system.memory import release_freed_memory


@contextmanager
def recomputed(model: nn.Module, blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Have blocks of a model, which may be offloaded, computed again in the backward pass."""
    for block in blocks:
        block.forward = _recomputing(model, block)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _recomputing(model: nn.Module, block: nn.Module) -> Any:
    forward: Any = block.forward

    def holding() -> AbstractContextManager[None]:
        handle = offload_of(model)
        return handle.holding(block) if handle is not None else nullcontext()

    def call(*args: Any, **kwargs: Any) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        floating = [place for place in places if leaves[place].is_floating_point()]
        if floating and not any(leaves[place].requires_grad for place in floating):
            leaves[floating[0]] = leaves[floating[0]].detach().requires_grad_()  # else nothing is recomputed
        structure: list[Any] = []

        def run(*tensors: Tensor) -> tuple[Any, ...]:
            own = list(leaves)
            for place, tensor in zip(places, tensors, strict=True):
                own[place] = tensor
            own_args, own_kwargs = tree_unflatten(own, spec)
            returned, own_spec = tree_flatten(forward(*own_args, **own_kwargs))
            structure[:] = [own_spec]
            return tuple(returned)

        outputs = _Recompute.apply(run, holding, *(leaves[place] for place in places))
        return tree_unflatten(list(outputs), structure[0])

    return call


class _Recompute(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, run: Any, holding: Any, *tensors: Tensor) -> Any:
        ctx.run, ctx.holding = run, holding
        ctx.save_for_backward(*tensors)
        return run(*tensors)

    @staticmethod
    @override
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        inputs = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in ctx.saved_tensors]
        with ctx.holding():
            with torch.enable_grad():
                outputs = ctx.run(*inputs)
            pairs = [
                (output, gradient)
                for output, gradient in zip(outputs, gradients, strict=True)
                if isinstance(output, Tensor) and output.requires_grad and gradient is not None
            ]
            if pairs:
                torch.autograd.backward([output for output, _ in pairs], [gradient for _, gradient in pairs])
        del outputs, pairs
        release_freed_memory()  # the block's activations, else what one leaves behind adds up to the next one's
        return None, None, *(tensor.grad for tensor in inputs)
