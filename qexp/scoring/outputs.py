"""How far a network's outputs are from the unquantized one's: over all of them, and one by one in outputs.csv.

relative_l2 and cosine over all outputs are those of one long vector of all their elements: large outputs count more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from qexp.metrics.tensors import compare, compare_all
from qexp.system.files import to_csv, write_text

OUTPUTS = "outputs.csv"
COLUMNS = ("output", "shape", "relative_l2", "cosine", "max_abs_error", "exact")
REFERENCE_METRICS = ("relative_l2", "cosine")


def output_numbers(
    names: Sequence[str], outputs: Mapping[str, Tensor], expected: Mapping[str, Tensor] | None, folder: Path
) -> dict[str, float | None]:
    """With a reference, exact and the metrics among `names` that outputs have; writes outputs.csv then."""
    if expected is None:
        return {}
    rows = []
    for name, output in outputs.items():
        one = compare(expected[name], output)
        shape = "x".join(map(str, output.shape))
        values = {column: getattr(one, column) for column in ("relative_l2", "cosine", "max_abs_error")}
        rows.append({"output": name, "shape": shape, **values, "exact": int(one.exact)})
    write_text(folder / OUTPUTS, to_csv(list(COLUMNS), rows))
    both = compare_all((expected[name], output) for name, output in outputs.items())
    return {name: getattr(both, name) for name in REFERENCE_METRICS if name in names} | {"exact": float(both.exact)}
