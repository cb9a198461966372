"""Whether an experiment has to run: what `resume=` makes of what is on disk.

    missing   keep what is done, run everything else (what was unsupported too: the machine may have changed)
    failed    run again what failed, leave everything else as it is, what never ran too
    stale     as missing, and run again what was made with other library versions, another Python or commit, on another
              machine or device, or with another number of threads or cores
    none      run everything

A finished run that lacks some of the metrics asked for is only scored for these, from its saved outputs; if they were
deleted it runs again. So it is with one whose scoring was cut off: result.json is written at the end of a run and
removed at the start of the next. `none` runs the reference again too, once in a sweep.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qexp.checkpoints.pipeline_folder import INDEX
from qexp.config.schema import PERCEPTUAL_METRICS, MetricsConfig, RunConfig, SaveConfig
from qexp.experiments.reference import saves_outputs
from qexp.results.environment import differences
from qexp.results.run_folder import PUSHED, SAVED, RunFolder
from qexp.results.saved_files import find_saved
from qexp.sweep.damage import OUTPUTS
from qexp.system.files import read_json, read_yaml

SCORED_FILES = (OUTPUTS, "memory.csv")  # of a run, from which it can be scored


@dataclass(frozen=True)
class Decision:
    """action: run, score (metrics only) or keep; why: for people, '' where it goes without saying."""

    action: Literal["run", "score", "keep"]
    why: str = ""


def decide(config: RunConfig, folder: RunFolder, damaged: Sequence[str] = ()) -> Decision:
    """Decide how to proceed with an experiment from the contents of its folder.

    The caller has locked it, or it does not exist.

    damaged: files that were moved aside. A run without its outputs still has its result.
    """
    mode = config.resume
    if mode == "none":
        return Decision("run")
    if lost := [name for name in damaged if name != OUTPUTS]:
        return Decision("run", f"{' and '.join(lost)} of its first run was damaged")
    status, result = folder.read_status(), folder.read_result()
    if mode == "failed" and (status is None or status.status != "failed"):
        return Decision("keep")
    if status is None:
        return Decision("run")
    if saves_outputs(config) and (unsaved := _unsaved(config, folder)):
        return Decision("run", f"its model is to be {unsaved}")
    if result is None:
        return Decision("run", f"it was {status.status} before ({status.reason})" if status.reason else "")
    if mode == "stale" and (changed := differences(result["env"], config)):
        return Decision("run", f"since then: {', '.join(changed)}")
    if not saves_outputs(config):
        return Decision("keep" if status.status == "done" else "run")
    if status.status != "done":
        return _score_if_possible(folder, "it ran before, but was not scored")
    known = scored_names(result, config.metrics)
    if lacking := [name for name in config.metrics.names if name not in known]:
        return _score_if_possible(folder, f"for {', '.join(lacking)}")
    return Decision("keep")


def scored_names(result: Mapping[str, Any], metrics: MetricsConfig) -> tuple[str, ...]:
    """Return the metrics that a result has been scored for, with the same settings as now."""
    scored = result.get("scored") or {}
    changed = {name for name, key in PERCEPTUAL_METRICS.items() if scored.get(key) != getattr(metrics, key)}
    return tuple(name for name in scored.get("names", ()) if name not in changed)


LAYOUT = ("max_shard_gib", "interchange", "layout")  # settings of `save` that make other files


def _unsaved(config: RunConfig, folder: RunFolder) -> str:
    """Name the part of `save` that is not done yet, '' if none.

    Changes in a hub's repository since are not looked up.
    """
    save, written = config.save, (read_yaml(folder.path / "config.yaml") or {}).get("save") or {}
    if save.path is not None and not _saved_without_note(save.path, written, folder):
        found = find_saved(folder.path, Path(save.path))
        if found != "same":
            return f"saved to {save.path}" + (", where other files are now" if found == "changed" else "")
    if save.wanted and all(written.get(name) == getattr(save, name) for name in ("path", "push_to_hub")):
        changed = [name for name in LAYOUT if written.get(name, getattr(SaveConfig(), name)) != getattr(save, name)]
        if changed:
            return f"saved with another {changed[0]}: {save.wanted}"
    pushed = read_json(folder.path / PUSHED) or {}
    there = (pushed.get("repo_id"), pushed.get("revision"))
    if save.push_to_hub is not None and there != (save.push_to_hub, save.revision):
        return f"pushed to {save.push_to_hub}"
    return ""


def _saved_without_note(path: str, written: Mapping[str, Any], folder: RunFolder) -> bool:
    """Return whether a run of an earlier version, which wrote no saved.json, has saved its model to a path."""
    is_there = any(Path(path, name).exists() for name in ("config.json", INDEX))
    return not folder.holds(SAVED) and written.get("path") == path and is_there


def _score_if_possible(folder: RunFolder, why: str) -> Decision:
    gone = [name for name in SCORED_FILES if not folder.holds(name)]
    return Decision("run", f"{why}; {' and '.join(gone)} of its first run is gone") if gone else Decision("score", why)
