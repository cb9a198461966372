"""Random numbers of a pipeline's call from the generators of its samples, wherever they are drawn.

Pipelines take generators for the noise that they start from. Schedulers, autoencoders and language models draw more,
some of it from torch's global generator (`FlowMatchEulerDiscreteScheduler` with stochastic_sampling, LTX's decoder):
what a sample gets then depends on the samples beside it, and on what was drawn before. Inside `noise_of_samples`
torch's functions draw row i of a batch from generator i.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Generator, Tensor

OF_SIZES = ("randn", "rand", "randint", "randperm", "normal")
OF_TENSORS = ("multinomial", "bernoulli", "poisson")
LIKE = {"randn_like": "randn", "rand_like": "rand", "randint_like": "randint"}
TORCH_NORMAL, TORCH_RANDPERM = torch.normal, torch.randperm
IN_PLACE = ("normal_", "uniform_", "exponential_", "random_", "bernoulli_", "log_normal_", "cauchy_", "geometric_")


class MixedNoiseError(Exception):
    """Numbers were drawn for several samples together, such as one field for all of them."""


@contextmanager
def noise_of_samples(generators: Sequence[Generator]) -> Iterator[None]:
    """Draw what has no generator of its own from these, on the CPU, a generator for each sample of the batch.

    Raises: MixedNoiseError, where it is drawn, for numbers that are of no single sample.
    """
    with ExitStack() as stack:
        for names, owner, draw in (
            (OF_SIZES, torch, _draw_sizes), (OF_TENSORS, torch, _draw_from), (LIKE, torch, _draw_like),
            (IN_PLACE, Tensor, _draw_in_place),
        ):  # fmt: skip
            for name in names:
                original = getattr(owner, name)
                stack.enter_context(patch.object(owner, name, _drawing(original, draw, list(generators))))
        yield


def _drawing(original: Callable[..., Any], draw: Callable[..., Any], generators: list[Generator]) -> Callable[..., Any]:
    """`original`, with one generator a sample if the caller gives none, or a list."""

    def function(*arguments: Any, **keywords: Any) -> Any:
        given = keywords.pop("generator", None)
        if isinstance(given, Generator):
            return original(*arguments, generator=given, **keywords)
        return draw(original, list(given or generators), arguments, keywords)

    return function


def _draw_sizes(original: Callable[..., Tensor], generators: list[Generator], arguments: Any, keywords: Any) -> Tensor:
    """torch.randn(2, 3), torch.randint(9, (2, 3)), torch.normal(0.0, 1.0, size=(2, 3)), torch.randperm(5)."""
    if original is TORCH_NORMAL and any(isinstance(value, Tensor) for value in (*arguments, *keywords.values())):
        return _draw_from(original, generators, arguments, keywords)  # of tensors of means
    device = keywords.get("device")
    keywords = {**keywords, "device": "cpu"}
    if len(generators) == 1:
        return original(*arguments, generator=generators[0], **keywords).to(device)
    if "size" in keywords:
        size = keywords.pop("size")
    elif isinstance(arguments[-1], tuple | list):
        *arguments, size = arguments
    else:
        arguments, size = (), arguments
    if original is TORCH_RANDPERM or not size or size[0] != len(generators):
        raise MixedNoiseError(f"torch.{original.__name__} for {len(generators)} samples together")
    shape = (1, *size[1:])
    return torch.cat([original(*arguments, size=shape, generator=one, **keywords) for one in generators]).to(device)


def _draw_like(original: Callable[..., Tensor], generators: list[Generator], arguments: Any, keywords: Any) -> Tensor:
    like, *limits = arguments
    keywords = {key: value for key, value in keywords.items() if key != "memory_format"}
    options = {"dtype": like.dtype, "device": like.device, **keywords}
    of_sizes = getattr(torch, LIKE[original.__name__])
    return of_sizes(*limits, size=tuple(like.shape), generator=generators, **options)


def _draw_from(original: Callable[..., Tensor], generators: list[Generator], arguments: Any, keywords: Any) -> Tensor:
    """Return a draw by the values of a tensor [samples, ...], given as the first argument or as `input`."""
    named = {**keywords}
    source = arguments[0] if arguments else named.pop("input")

    def draw(row: Tensor, generator: Generator) -> Tensor:
        return original(row, *arguments[1:], generator=generator, **named)

    if len(generators) == 1:
        return draw(source.cpu(), generators[0]).to(source.device)
    if source.dim() < 2 or len(source) != len(generators):
        raise MixedNoiseError(f"torch.{original.__name__} for {len(generators)} samples together")
    rows = source.cpu().split(1)
    return torch.cat([draw(row, one) for row, one in zip(rows, generators, strict=True)]).to(source.device)


def _draw_in_place(
    original: Callable[..., Tensor], generators: list[Generator], arguments: Any, keywords: Any
) -> Tensor:
    tensor, *parameters = arguments
    if len(generators) > 1 and (tensor.dim() == 0 or len(tensor) != len(generators)):
        raise MixedNoiseError(f"Tensor.{original.__name__} for {len(generators)} samples together")
    rows = tensor.split(1) if len(generators) > 1 else [tensor]
    for row, generator in zip(rows, generators, strict=True):
        row.copy_(original(torch.empty_like(row, device="cpu"), *parameters, generator=generator, **keywords))
    return tensor
