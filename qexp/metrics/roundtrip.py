"""Errors of weights that were quantized and dequantized, over the layers; the formulas are in `tensors.py`.

Means are over the layers that are neither exact (which have an infinite ratio) nor broken.
"""

from __future__ import annotations

from math import inf

from qexp.metrics.registry import Metric

LOSSLESS = ("roundtrip/exact_layers", "roundtrip/layers")


def _metric(name: str, meaning: str, **other: object) -> Metric:
    return Metric(f"roundtrip/{name}", meaning, tasks=("roundtrip",), **other)  # type: ignore[arg-type]


def _count(name: str, meaning: str) -> Metric:
    return _metric(name, meaning, range=(0, inf), digits=".0f")


METRICS = (
    _metric(
        "sqnr_db_mean", "mean SQNR of a layer's weights; null if all layers are exact", header="SQNR dB", unit="dB",
        better="higher", mean_over="inexact_layers", order=10, axis="mean SQNR of the weights (dB)",
        brief="sqnr {:.1f} dB", infinite_if=LOSSLESS,
    ),
    _metric(
        "sqnr_db_min", "SQNR of the worst layer", header="SQNR min", unit="dB", better="higher", order=20,
        infinite_if=LOSSLESS,
    ),
    _metric(
        "max_abs_error", "greatest error of a weight", header="max error", better="lower", range=(0, inf), digits=".2e",
        order=30,
    ),
    _metric(
        "relative_l2_mean", "mean relative L2 error of a layer", better="lower", range=(0, inf),
        mean_over="finite_layers", digits=".2e",
    ),
    _metric("cosine_min", "least cosine of a layer with its original", better="higher", range=(-1, 1), digits=".6f"),
    _count("layers", "layers that were quantized and dequantized"),
    _count("exact_layers", "layers without any error"),
    _count("nonfinite_layers", "layers that are not finite once they are dequantized"),
    _count("inexact_layers", "layers with a finite SQNR: the n of its mean"),
    _count("finite_layers", "layers with a finite relative error: the n of its mean"),
)  # fmt: skip
