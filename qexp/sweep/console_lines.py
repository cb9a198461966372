"""What a sweep prints while it runs: a line when an experiment starts, and one when it ends.

[3/12] digits · torchao int8wo · leaf→disk · generate: done in 8.1 s, psnr 31.2 dB, 4.9 MiB (2 done, 1 failed, 9 left)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from qexp.metrics.registry import all_metrics
from qexp.results.manifest import JobRow, jobs_left
from qexp.results.numbers import format_memory


def job_name(number: int | None, total: int | None, label: str) -> str:
    """'[3/12] label', '[3] label' where the total is not known, the label alone outside of a sweep."""
    if number is None:
        return label
    return f"[{number}/{total}] {label}" if total else f"[{number}] {label}"


def end_line(name: str, row: JobRow, manifest: Mapping[str, Any] | None) -> str:
    """Return how a job ended: its main numbers, or why it has none; and how far the sweep is."""
    parts = [_ending_words(row)]
    if row.status == "done":
        parts += [words for words in (_quality_words(row.metrics), _weights_words(row.metrics)) if words]
    elif row.message:
        parts[0] += f": {row.message}"
    return f"{name}: {', '.join(parts)}{_how_far(manifest)}"


def _ending_words(row: JobRow) -> str:
    if row.status == "done":
        done = "scored again" if row.rescored else f"done in {row.seconds:.1f} s"
        return f"reused from {row.key}" if row.reused else done
    reason = f" ({row.reason})" if row.reason and row.reason != row.status else ""
    return f"{'still ' if row.reused and row.status != 'skipped' else ''}{row.status}{reason}"


def _quality_words(metrics: Mapping[str, float | None]) -> str | None:
    if metrics.get("quality/finite") == 0:
        count = metrics.get("quality/nonfinite")
        return f"not finite ({count:.0f} values)" if count else "not finite"
    if metrics.get("roundtrip/nonfinite_layers"):
        return f"{metrics['roundtrip/nonfinite_layers']:.0f} layers not finite"
    if metrics.get("quality/exact") == 1:
        return "identical to the reference"
    shown = ((metric.brief, metrics.get(name)) for name, metric in all_metrics().items() if metric.brief)
    return next((brief.format(value) for brief, value in shown if value is not None), None)


def _weights_words(metrics: Mapping[str, float | None]) -> str | None:
    gib = metrics.get("memory/weights_gib")
    return None if gib is None else format_memory(gib)


def _how_far(manifest: Mapping[str, Any] | None) -> str:
    if manifest is None:
        return ""
    counts = Counter(job["status"] for job in manifest["jobs"])
    parts = [f"{counts[status]} {status}" for status in ("done", "failed") if counts[status] or status == "done"]
    if (left := jobs_left(manifest)) is not None:
        parts.append(f"{left} left")
    return f" ({', '.join(parts)})"
