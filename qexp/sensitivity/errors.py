"""How far an output is from the unquantized model's, and Gaussian projections whose squares estimate the same.

Squared error: sum over rows of w_row |y' - y|^2. KL divergence of the next token: sum of w_row sum over positions of
KL(p || p'), p = softmax(y). For small d = y' - y the latter is d^T (diag(p) - p p^T) d / 2. A random v of covariance M
has E[(v^T d)^2] = d^T M d: so (v^T d)^2 estimates either, with M = w I, or M = w (diag(p) - p p^T) / 2, of which
sqrt(p) z - p (sqrt(p)^T z) is a draw for z ~ N(0, I).
"""

from __future__ import annotations

import torch
from torch import Tensor

POSITIONS = 1 << 22  # values of logits whose distributions are in memory at a time


def output_error(kind: str, expected: Tensor, found: Tensor, weights: Tensor) -> float:
    """Return the error of an output, [rows, ...]. kind: "squared_error" or "kl"; weights: [rows]."""
    if kind == "squared_error":
        each = (found.double() - expected.double()).square().flatten(1).sum(1)
        return float((each * weights).sum())
    total, rows = 0.0, max(POSITIONS // expected[0].numel(), 1)
    parts = zip(expected.split(rows), found.split(rows), weights.split(rows), strict=True)
    for own, other, weight in parts:
        log_p, log_q = own.double().log_softmax(-1), other.double().log_softmax(-1)
        divergence = (log_p.exp() * (log_p - log_q)).sum(-1)  # [rows, positions]
        total += float((divergence.clamp(min=0).flatten(1).sum(1) * weight).sum())  # below 0 is rounding
    return total


def draw_projection(kind: str, expected: Tensor, weights: Tensor, random: torch.Generator) -> Tensor:
    """Return a random v, of the output's shape, by which (v^T d)^2 of each row has the mean of its error."""
    scale = weights.to(expected).view(-1, *[1] * (expected.ndim - 1))
    if kind == "squared_error":
        return torch.randn(expected.shape, generator=random).to(expected) * scale.sqrt()
    found, rows = torch.empty_like(expected), max(POSITIONS // expected[0].numel(), 1)
    for own, factor, result in zip(
        expected.split(rows), (scale / 2).sqrt().split(rows), found.split(rows), strict=True
    ):
        p = own.softmax(-1)
        noise = torch.randn(own.shape, generator=random).to(own).mul_(p.sqrt())
        torch.sub(noise, p * noise.sum(-1, keepdim=True), out=result).mul_(factor)
    return found
