"""Perplexity: exp(mean nll) over the scored tokens of a text, in fp64; None where it is no finite number."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from qexp.metrics.registry import Metric, Result

if TYPE_CHECKING:
    from torch import Tensor


def perplexity(nll: Tensor) -> float | None:
    mean = nll.double().mean().item()
    return math.exp(mean) if mean < 700 else None  # NaN is not below 700 either


METRICS = (
    Metric(
        "quality/perplexity", "exp of the mean negative log-probability of a token",
        header="perplexity", better="lower", range=(1, math.inf), tasks=("generate", "perplexity"), mean_over="tokens",
        of_mean="exp", digits=".4f", order=120, brief="perplexity {:.4f}", needs=("nll",),
        compute=lambda samples: Result(perplexity(samples.outputs["nll"]), samples.outputs["nll"].double().tolist()),
    ),
)  # fmt: skip
