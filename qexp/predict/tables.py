"""The tables that `python -m qexp.predict` prints, as text or as markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qexp.loading.forecast import ComponentForecast, OffloadForecast

KIB, GIB = 1 << 10, 1 << 30
NOTHING = "–"
UNITS = {"GiB": GIB, "MiB": 1 << 20, "KiB": KIB}


@dataclass(frozen=True)
class ModelForecast:
    """A model in several backends.

    columns: backend -> component -> forecast, without components that a format cannot hold. offload: backend ->
    strategy -> forecast, for backends that can hold every component.
    """

    name: str
    components: tuple[str, ...]
    columns: Mapping[str, Mapping[str, ComponentForecast]]
    offload: Mapping[str, Mapping[str, OffloadForecast]]


def unit_of(models: Sequence[ModelForecast]) -> str:
    """Return the largest unit in which the largest total is at least 1."""
    totals = [strategies["none"].device for model in models for strategies in model.offload.values()]
    return next((unit for unit, size in UNITS.items() if max(totals, default=GIB) >= size), "KiB")


def weights_table(
    models: Sequence[ModelForecast], backends: Sequence[str], unit: str, memory: int | None
) -> list[list[str]]:
    """Return a row per component, the total, the peak of loading, and with `memory` the strategy that fits."""
    lines = [["model", "component", "weights", f"files {unit}", *(f"{name} {unit}" for name in backends)]]
    for model in models:
        for component in model.components:
            parts = [column.get(component) for column in model.columns.values()]
            known = next((part for part in parts if part is not None), None)
            head = [_count_cell(known.parameters), size(known.file_bytes, unit)] if known else [NOTHING, NOTHING]
            cells = [size(part.result_bytes, unit) if part else NOTHING for part in parts]
            lines.append([model.name, component, *head, *cells])
        lines += _sums(model, backends, unit)
        if memory is not None:
            lines.append([model.name, "fits with", "", "", *(_fitting(model, name, memory) for name in backends)])
    return lines


def _sums(model: ModelForecast, backends: Sequence[str], unit: str) -> list[list[str]]:
    whole = [list(column.values()) for name, column in model.columns.items() if name in model.offload]
    first = whole[0] if whole else []
    head = [_count_cell(sum(part.parameters for part in first)), size(sum(part.file_bytes for part in first), unit)]
    head = head if first else [NOTHING, NOTHING]
    totals = [model.offload[name]["none"] if name in model.offload else None for name in backends]
    held = [_memory_cell(one.device if one else None, unit) for one in totals]
    peaks = [_memory_cell(one.loading if one else None, unit) for one in totals]
    return [[model.name, "total", *head, *held], [model.name, "peak of loading", "", "", *peaks]]


def _fitting(model: ModelForecast, backend: str, memory: int) -> str:
    strategies = model.offload.get(backend)
    if strategies is None:
        return NOTHING
    found = next((name for name, forecast in strategies.items() if forecast.fits(memory)), "")
    return {"none": "resident", "": "nothing"}.get(found, f"offload={found}")


def offload_table(strategies: Mapping[str, OffloadForecast], unit: str, memory: int | None) -> list[list[str]]:
    """Return a row per strategy, and with `memory` whether it fits."""
    verdict = [] if memory is None else [f"device of {size(memory, unit)} {unit}"]
    lines = [["offload", f"on the device {unit}", f"while loading {unit}", f"in host memory {unit}", *verdict]]
    for name, found in strategies.items():
        if found.problem:
            lines.append([name, NOTHING, NOTHING, NOTHING, *(["cannot be used"] if verdict else [])])
            continue
        sizes = (size(nbytes, unit) for nbytes in (found.device, found.loading, found.host))
        answer = [] if memory is None else ["fits" if found.fits(memory) else "does not fit"]
        lines.append([name, *sizes, *answer])
    return lines


def size(nbytes: int, unit: str) -> str:
    return f"{nbytes / UNITS[unit]:.2f}"


def _memory_cell(nbytes: int | None, unit: str) -> str:
    return NOTHING if nbytes is None else size(nbytes, unit)


def _count_cell(number: int) -> str:
    """Format a number of parameters: '11.90 B', '5.01 M' or '610'."""
    for letter, amount in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= amount / 10 and number >= 1000:
            return f"{number / amount:.2f} {letter}"
    return str(number)


def formatted(lines: Sequence[Sequence[str]], left: int, markdown: bool) -> str:
    """Format a table with a header line; the first `left` columns are left-aligned."""
    if markdown:
        head = ["---"] * left + ["--:"] * (len(lines[0]) - left)
        return "\n".join("| " + " | ".join(line) + " |" for line in (lines[0], head, *lines[1:]))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
