"""Exact match: the fraction of prompts that are continued by exactly the reference's tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from qexp.metrics.registry import Metric, Result, Samples

if TYPE_CHECKING:
    from torch import Tensor


def exact_match(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Result:
    """Return the fraction of rows with equal tokens, [prompts, longest]; padding behind their lengths is ignored."""
    import torch

    longest = max(ours["tokens"].shape[1], theirs["tokens"].shape[1])
    place = torch.arange(longest)
    rows = [
        torch.nn.functional.pad(side["tokens"], (0, longest - side["tokens"].shape[1])).where(
            place < side["lengths"][:, None], -1
        )
        for side in (ours, theirs)
    ]
    same = (rows[0] == rows[1]).all(-1).double()
    return Result(same.mean().item(), same.tolist())


def _compute(samples: Samples) -> Result:
    assert samples.expected is not None
    return exact_match(samples.outputs, samples.expected) if samples.is_comparable else Result(None)


METRICS = (
    Metric(
        "quality/exact_match", "prompts that are continued as by the reference, token by token",
        header="exact match", better="higher", range=(0, 1), tasks=("generate",), mean_over="prompts", digits=".3f",
        order=125, brief="exact match {:.1%}", needs=("tokens",), compares=True, compute=_compute,
    ),
)  # fmt: skip
