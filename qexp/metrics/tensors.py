"""How far a restored tensor b is from its original a, over all elements:

    sqnr_db        10 log10(Σ a² / Σ (a - b)²)     signal to quantization noise; higher is better
    relative_l2    sqrt(Σ (a - b)² / Σ a²)         = 10^(-sqnr_db / 20)
    cosine         Σ ab / sqrt(Σ a² Σ b²)
    max_abs_error  max |a - b|

Sums are accumulated in fp64 over chunks of at most a million elements, so that a 4096² layer needs a few MiB of
scratch and not a copy of itself in fp64.

Edge cases, so that no number is infinite or NaN:
- equal tensors: exact, sqnr_db None (infinite), relative_l2 0, cosine 1 (also for two tensors of zeros, or without
  elements);
- an original of zeros that is not restored exactly: sqnr_db and relative_l2 None (minus and plus infinity);
- one of the two all zeros: cosine 0, since nothing of the direction is left;
- any value that is not finite, in either: `finite` is False and every number None.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Comparison:
    """The four numbers of one pass over both tensors; None where one is undefined (see the module's text)."""

    exact: bool
    finite: bool
    sqnr_db: float | None = None
    relative_l2: float | None = None
    cosine: float | None = None
    max_abs_error: float | None = None


def _matching_pieces(original: Tensor, restored: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Matching pieces in fp64: of the flat tensors if both are contiguous, otherwise whole rows of the first axis."""
    original, restored = original.detach(), restored.detach()
    if original.dim() == 0 or (original.is_contiguous() and restored.is_contiguous()):
        original, restored = original.reshape(-1), restored.reshape(-1)
    rows = max(1, CHUNK_ELEMENTS // max(1, math.prod(original.shape[1:])))
    for a, b in zip(torch.split(original, rows), torch.split(restored, rows), strict=True):
        yield a.double(), b.to(a.device).double()


def compare(original: Tensor, restored: Tensor) -> Comparison:
    """Return all numbers of this module in one pass. Raises ValueError for tensors of different shapes."""
    return compare_all([(original, restored)])


def compare_all(pairs: Iterable[tuple[Tensor, Tensor]]) -> Comparison:
    """Compare as `compare` does, over all elements of several (original, restored)."""
    signal = noise = energy = dot = largest = 0.0  # Σ a², Σ (a - b)², Σ b², Σ ab, max |a - b|
    for original, restored in pairs:
        if original.shape != restored.shape:
            raise ValueError(f"cannot compare shapes {tuple(original.shape)} and {tuple(restored.shape)}")
        for a, b in _matching_pieces(original, restored):
            if a.numel() == 0:
                continue
            difference = a - b
            signal += a.square().sum().item()
            energy += b.square().sum().item()
            dot += (a * b).sum().item()
            noise += difference.square().sum().item()
            largest = max(largest, difference.abs().max().item())
            if not math.isfinite(noise):  # NaN, too: inf - inf, and NaN would be lost in max()
                return Comparison(exact=False, finite=False)
    if largest == 0:
        return Comparison(exact=True, finite=True, relative_l2=0.0, cosine=1.0, max_abs_error=0.0)
    return Comparison(
        exact=False,
        finite=True,
        sqnr_db=10 * math.log10(signal / noise) if signal and noise else None,
        relative_l2=math.sqrt(noise / signal) if signal else None,
        cosine=max(-1.0, min(1.0, dot / math.sqrt(signal) / math.sqrt(energy))) if signal and energy else 0.0,
        max_abs_error=largest,
    )


def count_nonfinite(tensor: Tensor) -> int:
    """Return how many elements are NaN or infinite."""
    return int((~torch.isfinite(tensor)).sum())


def is_finite(tensor: Tensor) -> bool:
    return count_nonfinite(tensor) == 0
