"""Whether outputs are numbers at all, whether they are the reference's to the last bit, and how many there are."""

from __future__ import annotations

from math import inf

from qexp.metrics.registry import MODEL_TASKS, Metric, Samples


def _is_exact(samples: Samples) -> float:
    import torch

    if samples.pairs:
        return float(samples.comparison.exact and samples.is_complete)
    expected = samples.expected or {}
    same = all(torch.equal(samples.outputs[name], expected[name]) for name in expected if name in samples.outputs)
    return float(samples.is_comparable and same)


def _count(name: str, meaning: str, tasks: tuple[str, ...]) -> Metric:
    return Metric(f"quality/{name}", meaning, range=(0, inf), tasks=tasks, digits=".0f", order=900)


METRICS = (
    Metric(
        "quality/exact", "1 if every output is identical to the reference's", range=(0, 1), tasks=MODEL_TASKS,
        digits=".0f", order=800, compares=True, compute=_is_exact, is_chosen=False,
    ),
    Metric(
        "quality/finite", "1 if every value of the outputs is finite; if not, comparisons are null", range=(0, 1),
        tasks=MODEL_TASKS, digits=".0f", order=801,
    ),
    _count("nonfinite", "values (of text: tokens) that are not finite, if there are any", MODEL_TASKS),
    _count("images", "images that metrics are computed from", ("generate",)),
    _count("prompts", "prompts of a language model", ("generate",)),
    _count("tokens", "tokens of the text that are scored", ("generate", "perplexity")),
    _count("*_detected", "images that a pipeline's safety checker replaced, by its name for that", ("generate",)),
)  # fmt: skip
