"""Memory of weights, true bytes with scales and tables included, and the peaks while the task ran."""

from __future__ import annotations

from math import inf

from qexp.metrics.registry import MODEL_TASKS, Metric

METRICS = (
    Metric(
        "memory/weights_gib", "weights as they are held: of quantized layers, scales and tables included",
        header="weights {unit}", unit="GiB", better="lower", range=(0, inf), order=10,
        axis="memory of the weights ({unit})",
    ),
    Metric(
        "memory/bits_per_weight", "bits of a weight of the quantized layers, scales and tables included",
        header="bits/q. weight", unit="bits", better="lower", range=(0, inf), order=20,
    ),
    Metric(
        "memory/model_bits_per_weight", "bits of a weight of all that is loaded, unquantized layers included",
        header="bits/any weight", unit="bits", better="lower", range=(0, inf), order=21,
    ),
    Metric(
        "memory/run_peak_host_gib", "highest host memory while the task ran, above the baseline from before loading",
        header="run {unit}", unit="GiB", better="lower", range=(0, inf), digits=".1f", varies=True,
        is_of_process=True, order=30,
    ),
    Metric(
        "memory/run_peak_device_gib", "highest memory that torch had allocated on the device while the task ran",
        header="device {unit}", unit="GiB", better="lower", range=(0, inf), digits=".1f", varies=True, order=31,
    ),
    Metric(
        "memory/dense_weights_gib", "the same weights as they are in the checkpoint", unit="GiB", range=(0, inf)
    ),
    Metric(
        "memory/weights_*_gib", "weights by the place where they rest (cpu, disk, cuda_0), with a device map",
        unit="GiB", range=(0, inf), tasks=MODEL_TASKS,
    ),
)  # fmt: skip
