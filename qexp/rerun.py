"""Run a stored experiment again and compare its metrics.

    python -m qexp.rerun outputs/runs/<key>

The new result takes the place of the old one once it is complete, unless `--outputs` names another folder. It may be
started in any directory, and the outputs folder may have been moved: paths are stored as absolute ones. Metrics
that are declared to differ from run to run (times, rates, peaks of memory) are only shown; every other one must be
equal to the last digit.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from qexp.config.schema import PathsConfig, RunConfig, SaveConfig
from qexp.errors import ConfigError, DamagedFileError, LoadError, QexpError
from qexp.experiments.stored import run_config_from_container
from qexp.hub.download import pinned_model
from qexp.metrics.registry import find_metric
from qexp.results.environment import differences
from qexp.results.run_folder import LOCK, RunFolder
from qexp.sweep.damage import check_result
from qexp.sweep.job import run_job
from qexp.sweep.run_key import run_key
from qexp.system.command_parser import CommandParser
from qexp.system.files import disk_error, read_yaml
from qexp.system.program_name import program_name
from qexp.system.standard_streams import survive_closed_pipes
from qexp.tracking.session import check_login


def main() -> int:
    """Run the command; return 0 if every metric was reproduced, else 1."""
    parser = CommandParser(prog=program_name("rerun"), description="Run a stored experiment again.")
    parser.add_argument("run", type=Path, help="a run folder: outputs/runs/<key>")
    parser.add_argument("--outputs", type=Path, help="put the new run below this folder, and keep the old one")
    arguments = parser.parse()
    try:
        return rerun(arguments.run, arguments.outputs)
    except QexpError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def rerun(path: Path, outputs: Path | None) -> int:
    """Run the experiment in `path` again, print the differences, and return the exit code."""
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise ConfigError(f"{path} {what}; give the folder of a run, outputs/runs/<key>")
    folder = RunFolder(path.resolve())
    if folder.path.parent.name == "references":
        raise ConfigError(
            f"{path} is a reference, which runs are compared with, and not a run; to compute it again, delete it and "
            "run an experiment that needs it"
        )
    put_back(folder)
    config = stored_config(folder, outputs)
    old, overrides = read_old_result(folder), read_overrides(folder)
    key, old_key = run_key(config), old["key"] if old else folder.key
    if key != old_key:
        print(f"note: its key is now {key}, not {old_key}: the checkpoint or the rules of keys changed")
    for change in differences(old["env"], config) if old else ():
        print(f"note: the environment has changed: {change}")
    if config.tracking.mode == "online":
        check_login()
    with old_kept(folder):
        row = run_job(config, overrides, key=key)
        done = row.status == "done"
        if done:
            shutil.rmtree(aside(folder), ignore_errors=True)
    if not done:
        return 1
    if old is None:
        print(f"nothing to compare with: {path} had no result")
        return 0
    return report(old["metrics"], row.metrics)


def aside(folder: RunFolder) -> Path:
    """Return the folder that keeps the old run until the new one is complete."""
    return folder.path.with_name(f".{folder.key}.before")


@contextmanager
def old_kept(folder: RunFolder) -> Iterator[None]:
    """Keep hard links to a run's files, which `clear` and renaming do not touch; restore them unless removed."""
    if folder.holds("result.json"):
        try:
            shutil.copytree(folder.path, aside(folder), copy_function=_link_file, ignore=shutil.ignore_patterns(LOCK))
        except OSError as error:
            shutil.rmtree(aside(folder), ignore_errors=True)
            raise disk_error(aside(folder), error) from error
    try:
        yield
    finally:
        put_back(folder)


def put_back(folder: RunFolder) -> None:
    """Restore the old run that is kept beside a folder, after the new one failed or was interrupted."""
    kept = aside(folder)
    if not kept.is_dir():
        return
    with folder.locked(print):
        try:
            folder.clear()
            shutil.rmtree(folder.path / "wandb", ignore_errors=True)
            for entry in kept.iterdir():
                entry.rename(folder.path / entry.name)
            kept.rmdir()
        except OSError as error:
            raise disk_error(folder.path, error) from error
    print(f"the old result is kept: {folder.path}")


def _link_file(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # not every file system can
        shutil.copy2(source, target)


def stored_config(folder: RunFolder, outputs: Path | None) -> RunConfig:
    """Return the configuration of a run folder, changed to run in any case and to publish nothing.

    Raises: LoadError if there is none that this version can read.
    """
    path = folder.path / "config.yaml"
    container = read_yaml(path)
    if container is None:
        raise LoadError(
            f"{folder.path} is not a run folder: it has no config.yaml; give the folder of a run, outputs/runs/<key>"
        )
    try:
        config = run_config_from_container(container)
    except ConfigError as error:
        raise LoadError(f"{path} is damaged, or of another version: {error}") from error
    root = outputs or outputs_of(folder, config)
    layout = config.save.layout if config.save.path is not None else None  # what went to a hub alone is not saved again
    save = SaveConfig(config.save.path, config.save.max_shard_gib, config.save.interchange, layout)
    model = pinned_model(config.model)  # downloaded again if it is no longer here
    loader = replace(config.loader, cache=None)  # it is to be seen whether quantizing gives the same bytes
    return replace(config, model=model, resume="none", paths=PathsConfig(outputs=str(root)), save=save, loader=loader)


def outputs_of(folder: RunFolder, config: RunConfig) -> Path:
    """Return the outputs folder that a run is in; of one that was moved out of it, that folder.

    Raises: ConfigError if that is not there, or has the run as well: of two, none is overwritten.
    """
    if folder.path.parent.name == "runs":
        return folder.path.parents[1]
    stored = Path(config.paths.outputs)
    if stored.is_absolute() and stored.is_dir() and not (stored / "runs" / run_key(config)).exists():
        print(f"note: {folder.path} is in no outputs folder; the new run goes into {stored}, where it was made")
        return stored
    raise ConfigError(
        f"{folder.path} is not in the folder runs/ of an outputs folder; say with --outputs where the new run goes"
    )


def read_old_result(folder: RunFolder) -> dict[str, Any] | None:
    """Return the result to compare with, None if there is none. Raises DamagedFileError, DiskError."""
    try:
        check_result(folder)
    except DamagedFileError as error:
        remedy = "move it elsewhere to run the experiment again, with nothing to compare with"
        raise DamagedFileError(folder.path / "result.json", error.what, remedy) from error
    return folder.read_result()


def read_overrides(folder: RunFolder) -> list[str]:
    """Read the overrides that were typed for a run. Raises LoadError if they are missing."""
    path = folder.path / "overrides.txt"
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise LoadError(f"{path} cannot be read: {reason}; copy the whole run folder, or write an empty one") from error


def report(before: Mapping[str, Any], after: Mapping[str, Any]) -> int:
    """Print the comparison of two runs' metrics; return 0 if all metrics that must be equal are."""
    changed = list(changes(before, after))
    fixed = [line for name, line in changed if not is_varying(name)]
    varying = [line for name, line in changed if is_varying(name)]
    compared = sum(not is_varying(name) for name in {**before, **after})
    if varying:
        print("differs from run to run:", *varying, sep="\n  ")
    if fixed:
        print(f"NOT reproduced: {len(fixed)} of {compared} metrics differ:", *fixed, sep="\n  ")
        return 1
    print(f"reproduced: all {compared} metrics are equal to the last digit")
    return 0


def is_varying(name: str) -> bool:
    """Return whether the metric is declared to vary from run to run."""
    metric = find_metric(name)
    return metric is not None and metric.varies


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (name, 'name: old -> new (relative difference)') for each metric that differs."""
    for name in sorted({**before, **after}):
        old, new = before.get(name, "absent"), after.get(name, "absent")
        if old != new:
            yield name, f"{name}: {_format_value(old)} -> {_format_value(new)}{_relative(old, new)}"


def _format_value(value: object) -> str:
    return "null" if value is None else str(value)


def _relative(old: object, new: object) -> str:
    if not isinstance(old, int | float) or not isinstance(new, int | float) or math.isclose(old, 0):
        return ""
    return f" ({(new - old) / abs(old):+.2g} relative)"


if __name__ == "__main__":
    survive_closed_pipes()
    sys.exit(main())
