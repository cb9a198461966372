"""The table of a sensitivity run: what each format of each group of layers costs in the model's output.

    sensitivity.csv    component,group,layers,format,backend,bytes,score: a line for each (group, format); layers are
                       separated by ';', backend is JSON, the fields of a recipe's backend in full
    sensitivity.json   what the scores mean: of which checkpoint, by which error, over how many samples

Layers of a group have one format: they share a weight, or `task.groups` puts them together. A group is known by its
first layer. Every group has a line "none", which is dense: its score is 0. Scores add up: their sum over groups
predicts the cost of a mix. The two files are one table: the second is written last, and names the first by its digest.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from qexp.errors import ConfigError, DamagedFileError, DiskError
from qexp.system.files import read_json, to_csv, write_json, write_text
from qexp.tasks.sensitivity import SCORES

SCHEMA = 1  # raised when the same words come to mean something else
COLUMNS = ("component", "group", "layers", "format", "backend", "bytes", "score")
CSV, JSON = "sensitivity.csv", "sensitivity.json"
DENSE = "none"
ERRORS = ("squared_error", "kl")
REMEDY = "run task=sensitivity again"


@dataclass(frozen=True)
class Candidate:
    """A format of a group of layers.

    backend: the fields of its config, quant_method among them, as a recipe's rule takes them; nbytes: stored bytes of
    the group's weights in it, each shared one once; score: what it adds to the error of the model's output.
    """

    component: str
    group: str
    layers: tuple[str, ...]
    format: str
    backend: Mapping[str, Any]
    nbytes: int
    score: float


@dataclass(frozen=True)
class Header:
    """What the scores mean.

    checkpoint: component -> hash of its content; score: "exact", "final" or "gradient"; error: "squared_error" or
    "kl"; unit: of a score, in words; samples: how many it is a mean over; fixed_bytes: component -> bytes of all its
    tensors that are in no group; formats: those that were tried; versions: of the libraries; base: the format of all
    other layers while one is scored, "" if they are dense: scores are then what is added to the error of such a model.
    """

    checkpoint: Mapping[str, str]
    model: str
    score: str
    error: str
    unit: str
    samples: int
    fixed_bytes: Mapping[str, int]
    formats: tuple[str, ...]
    versions: Mapping[str, str]
    base: str = ""


@dataclass(frozen=True)
class SensitivityTable:
    """Candidates, those of one group behind one another, and what their scores mean."""

    header: Header
    candidates: tuple[Candidate, ...]

    def groups(self) -> dict[tuple[str, str], list[Candidate]]:
        """(component, group) -> its candidates, in the order of the table."""
        found: dict[tuple[str, str], list[Candidate]] = {}
        for candidate in self.candidates:
            found.setdefault((candidate.component, candidate.group), []).append(candidate)
        return found


def write_table(folder: Path, table: SensitivityTable) -> None:
    """Write both files. Raises ValueError for a table that `read_table` would refuse, DiskError."""
    text = to_csv(COLUMNS, [_to_row(candidate) for candidate in table.candidates])
    content = {"schema": SCHEMA, **asdict(table.header), "digest": _digest_of(text)}
    if (wrong := _fault_of(table)) is not None:
        raise ValueError(f"no sensitivity table: {wrong}")
    write_text(folder / CSV, text)
    write_json(folder / JSON, content)


def read_table(folder: Path) -> SensitivityTable:
    """Read the table in a run's folder.

    Raises: ConfigError if there is none; DamagedFileError if it holds something else, DiskError.
    """
    content = read_json(folder / JSON)
    if content is None:
        raise ConfigError(f"'{folder}' has no {JSON}; give the folder of a finished run of task=sensitivity")
    header = _read_header(folder / JSON, content)
    text = _read_text(folder / CSV)
    digest = content.get("digest")
    if digest not in (None, _digest_of(text)):  # a table that was made by hand need not have one
        raise DamagedFileError(folder / CSV, f"it is not the file that {JSON} was written with", REMEDY)
    table = SensitivityTable(header, tuple(_read_candidates(folder / CSV, text)))
    if (wrong := _fault_of(table)) is not None:
        raise DamagedFileError(folder / CSV, wrong, REMEDY)
    return table


def check_checkpoint(table: SensitivityTable, folder: Path, checkpoint: Mapping[str, str]) -> None:
    """Raise ConfigError for scores of another checkpoint. checkpoint: component -> hash of the one to be used."""
    for name, stored in table.header.checkpoint.items():
        if checkpoint.get(name) != stored:
            found = f"is {checkpoint[name][:12]}" if name in checkpoint else "is not there"
            raise ConfigError(
                f"'{folder}' has the scores of another checkpoint: '{name}' was {stored[:12]} ({table.header.model}), "
                f"and {found} now; give the scores of this checkpoint: {REMEDY}"
            )


def _to_row(candidate: Candidate) -> dict[str, object]:
    backend = json.dumps(candidate.backend, sort_keys=True, ensure_ascii=False, allow_nan=False)
    values = (
        candidate.component, candidate.group, ";".join(candidate.layers), candidate.format, backend, candidate.nbytes,
        repr(float(candidate.score)),
    )  # fmt: skip
    return dict(zip(COLUMNS, values, strict=True))


def _digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except FileNotFoundError:
        raise DamagedFileError(path, "it is not there", REMEDY) from None
    except UnicodeDecodeError as error:
        raise DamagedFileError(path, f"it is no UTF-8: {error}", REMEDY) from error
    except OSError as error:
        raise DiskError(f"{path}: cannot be read ({error.strerror}); make it readable, or {REMEDY}") from error


def _read_candidates(path: Path, text: str) -> list[Candidate]:
    lines = csv.reader(io.StringIO(text), strict=True)
    try:
        header, *rows = lines
        if tuple(header) != COLUMNS:
            raise ValueError(f"the columns must be {','.join(COLUMNS)}")
        return [_read_candidate(row, number) for number, row in enumerate(rows, start=2)]
    except (ValueError, csv.Error, RecursionError) as error:
        raise DamagedFileError(path, str(error), REMEDY) from error


def _read_candidate(row: Sequence[str], number: int) -> Candidate:
    """Raise ValueError for a line that is none of ours."""
    if len(row) != len(COLUMNS):
        raise ValueError(f"line {number} has {len(row)} values, not {len(COLUMNS)}")
    component, group, layers, name, backend, nbytes, score = row
    try:
        fields_of_backend = json.loads(backend)
        if not isinstance(fields_of_backend, dict) or not isinstance(fields_of_backend.get("quant_method"), str):
            raise ValueError(f"backend={backend} names no quant_method")
        return Candidate(component, group, tuple(layers.split(";")), name, fields_of_backend, int(nbytes), float(score))
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from None


def _read_header(path: Path, content: Mapping[str, Any]) -> Header:
    if content.get("schema") != SCHEMA:
        raise DamagedFileError(path, f"schema={content.get('schema')}, and this version reads {SCHEMA}", REMEDY)
    content = {"base": "", **content}  # of versions that had no base
    names = [item.name for item in fields(Header)]
    lacking = [name for name in names if name not in content]
    kinds: dict[str, Any] = {"samples": int, "formats": list} | dict.fromkeys(("checkpoint", "fixed_bytes"), dict)
    kinds |= {"versions": dict} | dict.fromkeys(("model", "score", "error", "unit", "base"), str)
    wrong = lacking or [name for name in names if not isinstance(content[name], kinds[name])]
    if wrong:
        raise DamagedFileError(path, f"{', '.join(wrong)} is missing or wrong", REMEDY)
    values: dict[str, Any] = {name: content[name] for name in names}
    return Header(**values | {"formats": tuple(values["formats"])})


def _fault_of(table: SensitivityTable) -> str | None:
    """Say what makes a table none; None if it is one."""
    header = table.header
    if header.score not in SCORES or header.error not in ERRORS:
        return f"score={header.score} must be one of {SCORES}, error={header.error} one of {ERRORS}"
    if any(type(nbytes) is not int or nbytes < 0 for nbytes in header.fixed_bytes.values()):
        return f"fixed_bytes={dict(header.fixed_bytes)} must be whole numbers, 0 or more"
    place_of: dict[tuple[str, str], tuple[str, str]] = {}  # (component, layer) -> its group
    for (component, group), candidates in table.groups().items():
        if (wrong := _fault_of_group(component, group, candidates)) is not None:
            return f"group '{group}' of '{component}': {wrong}"
        for layer in candidates[0].layers:
            if place_of.setdefault((component, layer), (component, group)) != (component, group):
                return f"layer '{layer}' of '{component}' is in two groups"
    components = {component for component, _ in place_of}
    if lacking := sorted(components - (header.checkpoint.keys() & header.fixed_bytes.keys())):
        return f"{JSON} has no checkpoint or fixed_bytes of {', '.join(lacking)}"
    return None if table.candidates else "it has no candidates"


def _fault_of_group(component: str, group: str, candidates: Sequence[Candidate]) -> str | None:
    layers, names = candidates[0].layers, [candidate.format for candidate in candidates]
    if any(candidate.layers != layers for candidate in candidates) or layers[0] != group or "" in (component, *layers):
        return "its lines have other layers than each other, or do not begin with the group's name"
    if len({*layers}) != len(layers) or any(";" in layer for layer in layers):
        return "a layer is in it twice, or has a ';' in its name"
    if len({*names}) != len(names):
        return f"a format is in it twice: {', '.join(names)}"
    for candidate in candidates:
        if candidate.nbytes < 0 or not math.isfinite(candidate.score) or candidate.score < 0:
            return f"bytes={candidate.nbytes}, score={candidate.score} of {candidate.format} must be 0 or more"
    if not any(candidate.format == DENSE and candidate.score == 0 for candidate in candidates):
        return f"it has no line {DENSE!r} with score 0"
    return None
