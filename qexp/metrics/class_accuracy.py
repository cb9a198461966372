"""Accuracy scores that a model source defines for its own outputs. Null for sources without one."""

from __future__ import annotations

from collections.abc import Callable

from qexp.metrics.registry import Metric, Result, Samples


def _own(name: str) -> Callable[[Samples], Result]:
    return lambda samples: Result(samples.own_scores().get(name), samples.own_samples().get(name))


METRICS = (
    Metric(
        "quality/class_accuracy", "images that the embedded classifier recognizes as their label",
        header="class acc.", better="higher", range=(0, 1), tasks=("generate",), mean_over="images", digits=".3f",
        order=30, needs=("images",), compute=_own("class_accuracy"),
    ),
    Metric(
        "quality/answer_accuracy", "arithmetic problems among the prompts that are solved",
        header="answer acc.", better="higher", range=(0, 1), tasks=("generate",), mean_over="prompts", digits=".3f",
        order=110, needs=("tokens",), compute=_own("answer_accuracy"),
    ),
)  # fmt: skip
