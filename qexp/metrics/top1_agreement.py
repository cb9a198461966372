"""Top-1 agreement: how often a model and its reference have the same most probable next token."""

from __future__ import annotations

from qexp.metrics.registry import Metric, Result, Samples


def _compute(samples: Samples) -> Result:
    assert samples.expected is not None
    if not samples.is_comparable:  # the most probable of NaN is always 0
        return Result(None)
    same = (samples.outputs["top1"] == samples.expected["top1"]).double()
    return Result(same.mean().item(), same.tolist())


METRICS = (
    Metric(
        "quality/top1_agreement", "tokens of a text for which both models have the same most probable next token",
        header="top-1 agreement", better="higher", range=(0, 1), tasks=("generate", "perplexity"), mean_over="tokens",
        digits=".4f", order=140, axis="same most probable token as the unquantized model", needs=("nll",),
        compares=True, compute=_compute,
    ),
)  # fmt: skip
