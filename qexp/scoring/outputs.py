"""How far a network's outputs are from the unquantized one's, one by one, in outputs.csv."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from qexp.metrics.tensors import compare
from qexp.system.files import to_csv, write_text

OUTPUTS = "outputs.csv"
COLUMNS = ("output", "shape", "relative_l2", "cosine", "max_abs_error", "exact")


def write_comparison(outputs: Mapping[str, Tensor], expected: Mapping[str, Tensor], folder: Path) -> None:
    """Write outputs.csv: the error of each output."""
    rows = []
    for name, output in outputs.items():
        one = compare(expected[name], output)
        shape = "x".join(map(str, output.shape))
        values = {column: getattr(one, column) for column in ("relative_l2", "cosine", "max_abs_error")}
        rows.append({"output": name, "shape": shape, **values, "exact": int(one.exact)})
    write_text(folder / OUTPUTS, to_csv(list(COLUMNS), rows))
