"""Numbers of `task=lm_eval` from the files that it leaves: the library counted the answers while the task ran."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qexp.errors import LoadError
from qexp.metrics.lm_eval import PREFIX
from qexp.system.files import read_json
from qexp.tasks.lm_eval import RESULTS

if TYPE_CHECKING:
    from torch import Tensor


def answer_numbers(folder: Path) -> dict[str, float | None]:
    """Return every metric of every task, its standard error, and the number of documents."""
    numbers: dict[str, float | None] = {}
    for task, found in _read_tasks(folder).items():
        for name, metric in found["metrics"].items():
            numbers[f"{PREFIX}{task}_{name}"] = metric["value"]
            numbers[f"{PREFIX}{task}_{name}_stderr"] = metric["stderr"]
        numbers[f"{PREFIX}{task}_n"] = float(found["n"])
    return numbers


def answer_samples(folder: Path, outputs: Mapping[str, Tensor]) -> dict[str, dict[str, tuple[float, float]]]:
    """Return metric -> document -> (value, weight), of metrics that are means; a document is known by its checksum."""
    values: dict[str, dict[str, tuple[float, float]]] = {}
    for task, found in _read_tasks(folder).items():
        names = [f"{task} {number} ({checksum})" for number, checksum in enumerate(found["documents"])]
        for metric in found["metrics"]:
            if (each := outputs.get(f"{task}.{metric}")) is not None:
                pairs = zip(names, each.tolist(), strict=True)
                values[f"{PREFIX}{task}_{metric}"] = {name: (value, 1.0) for name, value in pairs}
    return values


def _read_tasks(folder: Path) -> dict[str, Any]:
    found = read_json(folder / RESULTS)
    if found is None:
        raise LoadError(f"{folder / RESULTS} is missing, so there is nothing to score; run it again with resume=none")
    return found["tasks"]
