"""What loading took, and what became of the modules."""

from __future__ import annotations

from math import inf

from qexp.metrics.registry import MODEL_TASKS, Metric


def _peak(name: str, meaning: str, header: str = "", *, is_of_process: bool = True) -> Metric:
    return Metric(
        f"load/{name}_gib", meaning, header=header, unit="GiB", better="lower", range=(0, inf), tasks=MODEL_TASKS,
        digits=".1f", varies=True, is_of_process=is_of_process, order=10, is_minor=True,
    )  # fmt: skip


def _seconds(name: str, meaning: str, order: int) -> Metric:
    return Metric(
        f"load/{name}", meaning, unit="s", better="lower", range=(0, inf), tasks=MODEL_TASKS, varies=True, order=order
    )


def _count(name: str, meaning: str) -> Metric:
    return Metric(f"load/{name}", meaning, range=(0, inf), digits=".0f")


METRICS = (
    _peak("peak_host", "highest host memory while loading, above the baseline", header="load {unit}"),
    _peak("peak_anon", "its highest anonymous pages"),
    _peak("peak_file", "its highest file pages"),
    _peak("peak_device", "highest memory allocated on the device while loading", is_of_process=False),
    _peak("baseline_host", "host memory before loading: Python, torch, libraries"),
    _seconds("seconds", "time to load and quantize all components, planning included: the sum of the next three", 20),
    _seconds("plan_seconds", "of it, reading headers, building the network without weights, and planning", 21),
    _seconds("warm_up_seconds", "of it, the first use of libraries and compiled loops, which a process pays once", 22),
    _seconds("read_seconds", "of it, reading, quantizing and assigning the weights, and checking the model", 23),
    Metric(
        "load/cached", "whether quantized weights were kept from an earlier load, whose time and peaks these are",
        range=(0, 1), digits=".0f", tasks=MODEL_TASKS, varies=True,
    ),
    _count("quantized_modules", "layers that are quantized"),
    _count("skipped_modules", "layers that skip_modules left unquantized"),
    _count("left_dense_modules", "weights that no format quantizes"),
    Metric("load/left_dense_share", "their share of all weights", range=(0, 1), digits=".4f"),
    _count("unused_tensors", "tensors of the checkpoint that the model does not have"),
)  # fmt: skip
