"""Which files an experiment saved its model as: another one may have saved to the same folder since."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from qexp.results.run_folder import SAVED
from qexp.system.files import read_json, write_json


def note_saved(run_folder: Path, folder: Path, files: Iterable[Path]) -> None:
    """Write down the files of a saved model, as they are now."""
    names = [os.path.relpath(file, folder) for file in files]
    write_json(run_folder / SAVED, {"folder": os.path.abspath(folder), "files": _states(folder, names)})


def find_saved(run_folder: Path, folder: Path) -> str:
    """Say how the model in `folder` is the one that the experiment saved there: 'none', 'changed' or 'same'."""
    noted = read_json(run_folder / SAVED) or {}
    files = noted.get("files") or {}
    there = _states(folder, files)
    if noted.get("folder") != os.path.abspath(folder) or not there:
        return "none"
    return "same" if there == files else "changed"


def _states(folder: Path, names: Iterable[str]) -> dict[str, list[int]]:
    """Return name -> [bytes, time of the last change in ns], of the files that are there."""
    found = {}
    for name in names:
        with suppress(OSError):
            stat = os.stat(folder / name)
            found[name] = [stat.st_size, stat.st_mtime_ns]
    return found
