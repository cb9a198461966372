"""The metrics of loading and offloading, added up over components."""

from __future__ import annotations

from collections.abc import Sequence

from qexp.loading.component import LoadedComponent
from qexp.offloading.dispatch import Dispatch
from qexp.offloading.strategies import Offload
from qexp.system.memory import GIB, PeakMemory

Metrics = dict[str, float | None]


def load_statistics(loaded: Sequence[LoadedComponent]) -> Metrics:
    """Return the `load/` numbers of components loaded in a row: times add up, peaks are over the first baseline."""
    memories = [component.memory for component in loaded]
    cached = [component.cached for component in loaded if component.cached is not None]
    first = memories[0].baseline
    peaks = {
        "load/peak_host_gib": max(m.baseline.total_bytes + m.peak_bytes for m in memories) - first.total_bytes,
        "load/peak_anon_gib": max(m.baseline.anon_bytes + m.peak_anon_bytes for m in memories) - first.anon_bytes,
        "load/peak_file_gib": max(m.baseline.file_bytes + m.peak_file_bytes for m in memories) - first.file_bytes,
        "load/peak_device_gib": max(memory.peak_device_bytes for memory in memories),
    }
    times = [component.times for component in loaded]
    return {
        "load/seconds": sum(time.total for time in times),
        "load/plan_seconds": sum(time.plan for time in times),
        "load/warm_up_seconds": sum(time.warm_up for time in times),
        "load/read_seconds": sum(time.read for time in times),
        "load/baseline_host_gib": first.total_bytes / GIB,
        **{name: nbytes / GIB for name, nbytes in peaks.items()},
        **({"load/cached": float(all(cached))} if cached else {}),
    }


def load_trace(loaded: Sequence[LoadedComponent]) -> list[dict[str, float]]:
    """Return the host memory of the process while components loaded in a row: seconds of reading."""
    rows, passed = list[dict[str, float]](), 0.0
    for component in loaded:
        points = component.memory.trace.points()
        rows += [{"seconds": passed + seconds, "host_gib": nbytes / GIB} for seconds, nbytes in points]
        passed += component.times.read  # memory is sampled while weights are read
    return rows


def offload_statistics(offloads: Sequence[Offload | Dispatch]) -> Metrics:
    """Return the `offload/` numbers, and bytes by place where there is a device map, added up over components."""
    total: Metrics = {}
    for offload in offloads:
        for name, value in offload.statistics().items():
            total[name] = (total.get(name) or 0) + value
    return total


def run_peaks(peak: PeakMemory, baseline_bytes: int) -> Metrics:
    """Return the peaks while the task ran: of the host over the baseline before loading, of the device in all."""
    return {
        "memory/run_peak_host_gib": max(peak.baseline.total_bytes + peak.peak_bytes - baseline_bytes, 0) / GIB,
        "memory/run_peak_device_gib": peak.peak_device_bytes / GIB,
    }
