"""Files of an earlier run that cannot be what it wrote: kept in the folder `damaged`, so that the run is done again.

A power failure, a disk that lost blocks, a copy that was cut off or a wrong edit leave them. Nobody has to delete
anything, and nothing is lost that somebody may want to look at.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from qexp.checkpoints.checkpoint import read_header
from qexp.errors import DamagedFileError, LoadError
from qexp.results.run_folder import DAMAGED, PUSHED, SAVED, RunFolder
from qexp.sweep.run_key import KEY_DIGITS
from qexp.system.files import disk_error, read_json, read_yaml

OUTPUTS = "outputs.safetensors"  # of a run or a reference
KEY = re.compile(f"[0-9a-f]{{{KEY_DIGITS}}}")
RESULT_FIELDS = {"key": str, "config": dict, "metrics": dict, "env": dict}


def set_damage_aside(folder: RunFolder, say: Callable[[str], None]) -> list[str]:
    """Move damaged files to the folder `damaged`; returns their names. The caller has locked the folder.

    Raises: DiskError for files that cannot be read or moved; they may be whole.
    """
    found = find_damage(folder)
    for name, reason in found.items():
        say(f"{folder.path / name} is damaged ({reason}); it is kept as {_move(folder.path / name)}")
    return [*found]


def find_damage(folder: RunFolder) -> dict[str, str]:
    """Name of each damaged file -> what is wrong with it. Raises DiskError for files that cannot be read."""
    checks: dict[str, Callable[[], object]] = {
        "status.json": folder.read_status,
        "result.json": lambda: check_result(folder),
        "plan.json": lambda: read_json(folder.path / "plan.json"),
        **{name: partial(read_json, folder.path / name) for name in (PUSHED, SAVED)},
        "config.yaml": lambda: read_yaml(folder.path / "config.yaml"),
        OUTPUTS: lambda: _check_outputs(folder.path / OUTPUTS),
    }
    found = {}
    for name, check in checks.items():
        try:
            check()
        except DamagedFileError as error:
            found[name] = error.what
    return found


def check_result(folder: RunFolder) -> None:
    """Raise DamagedFileError for a result.json that cannot be what the run in this folder wrote, DiskError."""
    result: dict[str, Any] | None = folder.read_result()
    if result is None:
        return
    lacking = [name for name, kind in RESULT_FIELDS.items() if not isinstance(result.get(name), kind)]
    path = folder.path / "result.json"
    if lacking:
        raise DamagedFileError(path, f"it lacks {', '.join(lacking)}")
    if not isinstance(result["env"].get("versions", {}), dict):
        raise DamagedFileError(path, "env.versions is no group")
    if result["key"] != folder.key and KEY.fullmatch(folder.key):  # a copy may have any other name
        raise DamagedFileError(path, f"it is of run {result['key']}")
    if wrong := [name for name, value in result["metrics"].items() if not isinstance(value, int | float | None)]:
        raise DamagedFileError(path, f"{wrong[0]} is no number")


def _check_outputs(path: Path) -> None:
    """The header and the length; to read every byte would take as long as to compute small ones."""
    if not path.exists():
        return
    try:
        path.open("rb").close()
        read_header(path)
    except IsADirectoryError as error:
        raise DamagedFileError(path, "it is a folder") from error
    except LoadError as error:
        raise DamagedFileError(
            path, str(error).removeprefix(f"'{path}' ").removesuffix("; download it again")
        ) from error


def _move(path: Path) -> Path:
    """Move a file into `damaged` beside it, under a number if there is one already."""
    place = path.parent / DAMAGED
    number = 0
    while (target := place / (f"{path.name}.{number}" if number else path.name)).exists():
        number += 1
    try:
        place.mkdir(exist_ok=True)
        os.replace(path, target)
    except OSError as error:
        raise disk_error(target, error) from error
    return target
