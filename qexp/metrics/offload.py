"""What offloading moved, and where weights rest; counted, not measured, so the same in every run."""

from __future__ import annotations

from math import inf

from qexp.metrics.registry import MODEL_TASKS, Metric


def _bytes(name: str, meaning: str) -> Metric:
    return Metric(f"offload/{name}_gib", meaning, unit="GiB", range=(0, inf), tasks=MODEL_TASKS)


def _count(name: str, meaning: str) -> Metric:
    return Metric(f"offload/{name}", meaning, range=(0, inf), tasks=MODEL_TASKS, digits=".0f")


METRICS = (
    _count("groups", "groups of modules whose weights travel together"),
    _bytes("payload", "weights that travel"),
    _bytes("resident", "weights that stay on the device"),
    _bytes("at_rest_device", "weights that travel but are on the device between their uses"),
    _bytes("ring", "buffers on the device that they travel into"),
    _bytes("transferred", "what was copied to the device in all"),
    _count("copies", "copies to the device"),
)
