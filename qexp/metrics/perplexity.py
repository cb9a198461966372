"""Perplexity: exp(mean nll) over the scored tokens of a text, in fp64; None where it is no finite number.

Its standard error takes a window as one sample, since its tokens are alike: with S and n the sums of nll and of tokens
of each of k windows and m = sum(S) / sum(n), the error of m is sqrt(k / (k - 1) * sum((S - m n)^2)) / sum(n), and that
of exp(m) is exp(m) times as large. By byte, n are bytes of the text in UTF-8: such numbers compare models of different
tokenizers.

Sources: Cochran, Sampling Techniques (1977), 6.3, the variance of a ratio; the Pile, arXiv:2101.00027, bits per byte.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from qexp.metrics.registry import Metric, Result, Samples

if TYPE_CHECKING:
    from torch import Tensor

TASKS = ("generate", "perplexity")


def perplexity(nll: Tensor) -> float | None:
    """Return exp(mean nll) of tokens, [n]."""
    return _exp(nll.double().mean().item())


def ratio_error(sums: Tensor, sizes: Tensor) -> float | None:
    """Return the standard error of sum(sums) / sum(sizes) over windows, [k] each; None for fewer than two."""
    count, total = len(sums), float(sizes.sum())
    if count < 2 or not total:
        return None
    residuals = sums - sums.sum() / total * sizes
    error = math.sqrt(count / (count - 1) * float(residuals.square().sum())) / total
    return error if math.isfinite(error) else None


def _compute(samples: Samples) -> Result:
    """Compute perplexity by token; by byte and errors where outputs have windows and bytes of tokens."""
    import torch

    nll = samples.outputs["nll"].double()
    also: dict[str, float | None] = {}
    if "windows" in samples.outputs:
        windows = samples.outputs["windows"].long()
        sums, tokens = (torch.bincount(windows, weights) for weights in (nll, torch.ones_like(nll)))
        also["quality/perplexity_stderr"] = _error(sums, tokens)
        if "bytes" in samples.outputs:
            sizes = torch.bincount(windows, samples.outputs["bytes"].double())
            mean = float(nll.sum() / sizes.sum()) if sizes.sum() else math.nan
            also["quality/byte_perplexity"] = _exp(mean)
            also["quality/byte_perplexity_stderr"] = _error(sums, sizes)
            also["quality/bits_per_byte"] = mean / math.log(2) if math.isfinite(mean) else None
    return Result(perplexity(nll), nll.tolist(), also)


def _error(sums: Tensor, sizes: Tensor) -> float | None:
    """Return the standard error of exp(sum(sums) / sum(sizes)), to first order."""
    error = ratio_error(sums, sizes)
    value = _exp(float(sums.sum() / sizes.sum())) if error is not None else None
    return value * error if value is not None and error is not None else None


def _exp(mean: float) -> float | None:
    return math.exp(mean) if mean < 700 else None  # NaN is not below 700 either


METRICS = (
    Metric(
        "quality/perplexity", "exp of the mean negative log-probability of a token",
        header="perplexity", better="lower", range=(1, math.inf), tasks=TASKS, mean_over="tokens",
        of_mean="exp", digits=".4f", order=120, brief="perplexity {:.4f}", needs=("nll",), compute=_compute,
    ),
    Metric(
        "quality/perplexity_stderr", "its standard error, of windows of the text; null for one window",
        range=(0, math.inf), tasks=TASKS, digits=".4f", order=121,
    ),
    Metric(
        "quality/byte_perplexity", "exp of the negative log-probability of the text, divided by its bytes",
        better="lower", range=(1, math.inf), tasks=TASKS, digits=".4f", order=122,
    ),
    Metric(
        "quality/byte_perplexity_stderr", "its standard error, of windows of the text; null for one window",
        range=(0, math.inf), tasks=TASKS, digits=".4f", order=123,
    ),
    Metric(
        "quality/bits_per_byte", "bits that the model needs for a byte of the text: log2 of the perplexity by byte",
        unit="bits", better="lower", range=(0, math.inf), tasks=TASKS, digits=".4f", order=124,
    ),
)  # fmt: skip
