"""CSV files of run folders, as rows of text; one that cannot be read costs what it would have shown, and says so."""

from __future__ import annotations

import math
from pathlib import Path

from qexp.errors import DamagedFileError
from qexp.system.files import read_csv


def read_table(path: Path, needed: tuple[str, ...]) -> list[dict[str, str]]:
    """Return the rows of a CSV file; [] if there is none.

    Raises: DamagedFileError if it lacks a column of `needed` or is no text, DiskError if it cannot be read.
    """
    rows = read_csv(path) or []
    if any(row.get(name) is None for row in rows for name in needed):
        raise DamagedFileError(path, f"a line of it lacks {', '.join(needed)}")
    return rows


def number_of(text: str | None, path: Path, digits: int = 5) -> float | None:
    """Return a cell as a number of so many significant digits; None for one that is empty or not finite.

    Raises: DamagedFileError for any other text.
    """
    try:
        value = float(text) if text else math.nan
    except ValueError:
        raise DamagedFileError(path, f"'{text}' is no number") from None
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None
