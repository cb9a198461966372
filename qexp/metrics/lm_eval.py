"""Metrics of lm-eval's tasks: quality/lm_eval_<task>_<metric>, with its standard error and the number of documents.

The library computes them while the task runs (`tasks/lm_eval.py`). A family here is what is known of a metric by the
end of its name; one that is not listed has no better direction.
"""

from __future__ import annotations

from typing import Literal

from qexp.metrics.registry import Metric

HIGHER = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match", "f1", "mcc", "bleu", "chrf", "em")
LOWER = ("perplexity", "bits_per_byte", "brier_score", "ter", "wer")
PREFIX = "quality/lm_eval_"


def _family(end: str, better: Literal["higher", "lower", ""], order: int) -> Metric:
    return Metric(
        f"{PREFIX}*{end and '_'}{end}", f"{end or 'any other number'} of a task of lm-eval", header="*",
        better=better, tasks=("lm_eval",), mean_over="documents", digits=".4f", order=order,
    )  # fmt: skip


METRICS = (
    Metric(
        f"{PREFIX}*_stderr", "standard error of a number of lm-eval, as the library has it", tasks=("lm_eval",),
        digits=".4f", order=140,
    ),
    Metric(f"{PREFIX}*_n", "documents of a task of lm-eval", tasks=("lm_eval",), digits=".0f", order=141),
    *(_family(end, "lower", 142) for end in LOWER),
    *(_family(end, "higher", 143) for end in HIGHER),
    _family("", "", 144),
)  # fmt: skip
