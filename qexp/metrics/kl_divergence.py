"""KL divergence: the mean over tokens of Σ p ln(p / q), in nats; p and q are the distributions over next tokens of the
reference and of the run.

Where only the most probable next tokens are kept, it is that of coarser distributions: tokens that both have kept, and
one entry for all the others. That is never more than the full one (data processing inequality), and close to it if the
entry is rare; `kl_coverage` is the mean probability that the reference gives to the tokens compared one by one, 1 where
the whole vocabulary is kept. Sums are in fp64, over some rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from qexp.metrics.registry import Metric, Result, Samples

if TYPE_CHECKING:
    from torch import Tensor

    Rows = tuple[Tensor, Tensor | None]  # ln p [rows, kept] and ids [rows, kept], falling; without ids: the vocabulary


def kl_divergence(parts: Iterable[tuple[Rows, Rows]]) -> Result:
    """Return the mean KL divergence of (reference, ours), some rows at a time, and the coverage; None if not finite."""
    total = covered = 0.0
    samples = list[float]()
    for reference, ours in parts:
        divergence, coverage = divergence_of_rows(reference, ours)
        total, covered = total + divergence.sum().item(), covered + coverage.sum().item()
        samples += divergence.tolist()
    mean, count = total / len(samples), len(samples)
    if not math.isfinite(mean):
        return Result(None, also={"quality/kl_coverage": None})
    return Result(max(mean, 0.0), samples, also={"quality/kl_coverage": covered / count})


def divergence_of_rows(reference: Rows, ours: Rows) -> tuple[Tensor, Tensor]:
    """Return (KL divergence, probability of the tokens compared one by one) of each row, in fp64."""
    import torch

    log_p, log_q = reference[0].double(), ours[0].double()
    p = log_p.exp()
    if reference[1] is None or ours[1] is None:  # the whole vocabulary, in its own order
        return (p * (log_p - log_q)).sum(-1), torch.ones(len(p), dtype=torch.float64)
    order = ours[1].argsort(-1)
    ids, log_q = ours[1].gather(1, order), log_q.gather(1, order)
    place = torch.searchsorted(ids, reference[1]).clamp(max=ids.shape[1] - 1)
    common = ids.gather(1, place) == reference[1]
    log_q = log_q.gather(1, place)
    p_common, q_common = (torch.where(common, x, 0.0).sum(-1) for x in (p, log_q.exp()))
    one_by_one = torch.where(common, p * (log_p - log_q), 0.0).sum(-1)
    p_rest, q_rest = (1 - p_common).clamp(min=1e-12), (1 - q_common).clamp(min=1e-12)
    return one_by_one + p_rest * (p_rest / q_rest).log(), p_common


def _compute(samples: Samples) -> Result:
    found = kl_divergence(samples.tools["logprobs"]())
    return found if samples.is_comparable else Result(None, also={"quality/kl_coverage": None})


METRICS = (
    Metric(
        "quality/kl_divergence", "KL divergence of the next token's distribution from the reference's, in nats",
        header="KL div.", unit="nats", better="lower", range=(0, math.inf), tasks=("generate", "perplexity"),
        mean_over="tokens", digits=".2e", order=130, needs=("nll",), compares=True, compute=_compute,
    ),
    Metric(
        "quality/kl_coverage", "probability that the reference gives to the tokens that KL divergence compares singly",
        range=(0, 1), tasks=("generate", "perplexity"), mean_over="tokens", digits=".4f", order=131,
    ),
)  # fmt: skip
