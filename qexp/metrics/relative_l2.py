"""Errors of outputs against the reference's, over all elements as one long vector; the formulas are in `tensors.py`."""

from __future__ import annotations

from math import inf

from qexp.metrics.registry import Metric, Samples


def _latent_error(samples: Samples) -> float | None:
    from qexp.metrics.tensors import compare

    assert samples.expected is not None
    return compare(samples.expected["latents"], samples.outputs["latents"]).relative_l2


METRICS = (
    Metric(
        "quality/relative_l2", "norm of the error over that of the reference, of images or of what a network returns",
        header="relative L2", better="lower", range=(0, inf), tasks=("generate", "forward"), digits=".2e", order=50,
        brief="relative L2 {:.2e}", needs=("pairs",), compares=True, hidden_by="quality/psnr_db",
        compute=lambda samples: samples.comparison.relative_l2,
    ),
    Metric(
        "quality/cosine", "cosine of outputs and reference", better="higher", range=(-1, 1),
        tasks=("generate", "forward"), digits=".6f", order=51, needs=("pairs",), compares=True,
        compute=lambda samples: samples.comparison.cosine,
    ),
    Metric(
        "quality/latent_relative_l2", "relative L2 of a pipeline's last latents", better="lower", range=(0, inf),
        tasks=("generate",), digits=".2e", order=52, needs=("latents",), compares=True, compute=_latent_error,
    ),
)  # fmt: skip
