"""Print the metrics of result.json as the table of outputs/README.md.

python scripts/metrics_table.py          prints it
python scripts/metrics_table.py --write  puts it into outputs/README.md, between the comments that mark its place
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

from qexp.metrics.registry import TASKS, Metric, all_metrics
from qexp.system.files import write_text

PAGE = Path(__file__).parents[1] / "outputs" / "README.md"
BEGIN, END = "<!-- scripts/metrics_table.py -->\n", "<!-- end -->"


def table() -> str:
    """Return the table in Markdown, a line for each metric."""
    lines = ["| metric | unit | better | range | what it is |", "|---|---|---|---|---|"]
    lines += [" | ".join(("", *_cells(metric), "")).strip() for metric in all_metrics().values()]
    return "\n".join(lines) + "\n"


def _cells(metric: Metric) -> tuple[str, ...]:
    return f"`{metric.name}`", metric.unit, metric.better, _range(metric), f"{metric.meaning}{_notes(metric)}"


def _range(metric: Metric) -> str:
    low, high = metric.range
    if math.isinf(low):
        return ""
    return f"{low:g} or more" if math.isinf(high) else f"{low:g} to {high:g}"


def _notes(metric: Metric) -> str:
    """What else there is to say: its n, whether it varies, of which tasks it is."""
    group = metric.group
    mean = "exp of a mean" if metric.of_mean else "a mean"
    notes = [f"{mean} over `{group}/{metric.mean_over}`"] if metric.mean_over else []
    notes += [f"depends on n = `{group}/{metric.set_of}`: compare equal n only"] if metric.set_of else []
    notes += ["varies from run to run"] if metric.varies else []
    notes += ["null with `isolation=inline`"] if metric.is_of_process else []
    notes += ["with `metrics=perceptual`"] if metric.setting else []
    notes += [f"of {', '.join(metric.tasks)}"] if metric.tasks != TASKS else []
    return f" ({'; '.join(notes)})" if notes else ""


def main() -> None:
    if "--write" not in sys.argv[1:]:
        print(table(), end="")
        return
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    write_text(PAGE, before + BEGIN + table() + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
