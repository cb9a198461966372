"""samples.csv of a run folder: the value of each sample whose mean a metric is, so that means get an interval.

    seed,sample,metric,value,weight
    0,image 3: 7,quality/psnr_db,31.25,1

A sample is an image, a video (the mean over its frames: they are alike), a prompt, or a window of a text (the mean over
its tokens; `tokens 64-127 (9a3f…)` are their places and their checksum). Samples of one name and one seed are the same
in every run. A metric is sum(weight * value) / sum(weight) over its finite values, or the exponential of that
(`Metric.of_mean`). Weights are frames or tokens; `inf` is the PSNR of an image that is identical to its reference.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from qexp.errors import DamagedFileError
from qexp.system.files import read_csv, to_csv, write_text

SAMPLES = "samples.csv"
COLUMNS = ("seed", "sample", "metric", "value", "weight")
LONGEST = 80  # characters of a prompt in a name
Key = tuple[str, str]  # seed, sample
Values = dict[Key, tuple[float, float]]  # value, weight


def write_samples(folder: Path, seed: object, values: Mapping[str, Mapping[str, tuple[float, float]]]) -> None:
    """Write samples.csv: metric -> sample -> (value, weight). Without any, one of an earlier scoring is removed."""
    rows: list[dict[str, object]] = [
        {"seed": seed, "sample": sample, "metric": metric, "value": repr(value), "weight": f"{weight:g}"}
        for metric, found in values.items()
        for sample, (value, weight) in found.items()
    ]
    if rows:
        write_text(folder / SAMPLES, to_csv(COLUMNS, rows))
    else:
        (folder / SAMPLES).unlink(missing_ok=True)


def shorten_text(text: str) -> str:
    """Return a prompt as part of a sample's name: in full, or its beginning and a checksum of all of it."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}… ({zlib.crc32(text.encode()):08x})"


def mean_by_sample(names: Sequence[str], values: Sequence[float | None]) -> dict[str, tuple[float, float]]:
    """Return sample -> (mean of its finite values, their number); values that are undefined (None) are left out.

    A sample whose values are all infinite is infinite itself, with all of them.
    """
    parts: dict[str, list[float]] = {}
    for name, value in zip(names, values, strict=True):
        if value is not None:
            parts.setdefault(name, []).append(value)
    return {name: _mean_and_number(found) for name, found in parts.items()}


def _mean_and_number(values: Sequence[float]) -> tuple[float, float]:
    finite = [value for value in values if math.isfinite(value)] or values
    return math.fsum(finite) / len(finite) if math.isfinite(finite[0]) else finite[0], float(len(finite))


def read_samples(folder: Path) -> dict[str, Values]:
    """Return the values of each metric; {} for a run without them (of an earlier version).

    Raises: DamagedFileError, DiskError.
    """
    path = folder / SAMPLES
    rows, found = read_csv(path) or [], dict[str, Values]()
    if rows and "metric" not in rows[0]:
        return {}  # of version 0.2: prompts and texts
    try:
        for row in rows:
            values = found.setdefault(row["metric"], {})
            values[row["seed"], row["sample"]] = float(row["value"]), float(row["weight"])
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedFileError(path, f"a line of it is not {', '.join(COLUMNS)}") from error
    return found
