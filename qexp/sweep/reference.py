"""The reference of an experiment: run once, kept in `outputs/references/<key>`, shared by its candidates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from operator import eq
from pathlib import Path

from qexp.config.schema import PathsConfig, RunConfig
from qexp.experiments.reference import reference_config, saves_outputs
from qexp.results.outcome import Outcome
from qexp.results.run_folder import RunFolder, Status
from qexp.sweep.damage import OUTPUTS, find_damage, set_damage_aside
from qexp.sweep.run_key import reference_key
from qexp.sweep.worker import Work
from qexp.system.child_process import kill_marked
from qexp.system.files import to_yaml


def ensure_reference(
    config: RunConfig,
    work: Work,
    run: Callable[[Work], Status],
    say: Callable[[str], None],
    sweep: str | None,
    check: Callable[[], Status | None],
) -> tuple[Path | None, Status]:
    """(folder, status) of the reference that `config` is compared with, computed now if it is not there yet.

    check: called before it is computed; returns how the experiment ends if it cannot run, else None. The reference then
    stays as it is, and (None, that status) is returned.
    `resume=none` computes it anew. Neither that nor a failure is repeated for every experiment of a sweep: what was run
    with its token stands.
    """
    folder = RunFolder(Path(config.paths.outputs, "references", reference_key(config)))
    with folder.locked(say, config.isolation.timeout_minutes):
        damaged = set_damage_aside(folder, say)
        status = folder.read_status() if not damaged else None
        if status is not None and _stands(folder, status, config.resume, sweep):
            return folder.path, status
        if (refused := check()) is not None:
            return None, refused
        say(f"the reference (unquantized) is run first, once: {folder.path}")
        prepare_folder(folder, reference_config(config), ())
        status = run(replace(work, folder=folder.path, steps="run", reference=None))
        if status.status == "done" and reference_key(config) != folder.key:
            outcome = Outcome("failed", "load", "files of the model were changed while it ran; run it again")
            status = replace(status, **asdict(outcome))
        status = replace(status, sweep=sweep)
        folder.write_status(status)
        return folder.path, status


def _stands(folder: RunFolder, status: Status, resume: str, sweep: str | None) -> bool:
    """Return whether a reference is used, or given up, as it is. sweep: the token of the sweep that needs it."""
    of_this_sweep = sweep is not None and status.sweep == sweep
    if status.status != "done":
        return of_this_sweep
    return folder.holds(OUTPUTS) and (of_this_sweep or resume != "none")


def reference_is_there(config: RunConfig) -> bool:
    """Return whether an experiment is compared with nothing, or with what is finished."""
    if not saves_outputs(config):
        return True
    return known_reference(config, reference_key(config)) is not None


def known_reference(config: RunConfig, result_reference: str | None) -> Path | None:
    """Return the reference a result was scored against before, if its folder still holds it."""
    if result_reference is None:
        return None
    folder = RunFolder(Path(config.paths.outputs, "references", result_reference))
    status = folder.read_status() if not find_damage(folder) else None
    return folder.path if status is not None and status.status == "done" and folder.holds(OUTPUTS) else None


def prepare_folder(folder: RunFolder, config: RunConfig, overrides: Sequence[str], clear: bool = True) -> None:
    """Put a worker's orders into a folder, emptied first unless its outputs are still needed. Raises DiskError."""
    if clear:
        if folder.holds("status.json"):  # of a run that may have been killed
            kill_marked(partial(eq, str(folder.path.absolute())))
        folder.clear()
    stored = replace(config, paths=PathsConfig(str(Path(config.paths.outputs).absolute())))
    folder.write_text("config.yaml", to_yaml(stored.to_container()))
    folder.write_text("overrides.txt", "".join(f"{override}\n" for override in overrides))
