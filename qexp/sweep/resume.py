"""Whether an experiment has to run: what `resume=` makes of what is on disk.

    missing   keep what is done, run everything else (what was unsupported too: the machine may have changed)
    failed    run again what failed, leave everything else as it is, what never ran too
    stale     as missing, and run again what was made with other library versions or on another device
    none      run everything

A finished run whose metrics settings changed is only scored again, from its saved outputs. So is one whose scoring
failed or was cut off: result.json is written at the end of a run and removed at the start of the next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qexp.fields import to_plain
from qexp.settings import RunConfig
from qexp.sweep.environment import differences
from qexp.sweep.key import saves_outputs
from qexp.sweep.store import RunFolder


@dataclass(frozen=True)
class Decision:
    """action: run, score (metrics only) or keep; why: for people, '' where it goes without saying."""

    action: Literal["run", "score", "keep"]
    why: str = ""


def decide(config: RunConfig, folder: RunFolder) -> Decision:
    """What to do about an experiment, from what its folder holds. The caller has locked it, or it does not exist."""
    mode = config.resume
    if mode == "none":
        return Decision("run")
    status, result = folder.read_status(), folder.read_result()
    if mode == "failed" and (status is None or status.status != "failed"):
        return Decision("keep")
    if status is None:
        return Decision("run")
    if result is None:
        return Decision("run", f"it was {status.status} before ({status.reason})" if status.reason else "")
    if mode == "stale" and (changed := differences(result["env"], config)):
        return Decision("run", f"since then: {', '.join(changed)}")
    if not saves_outputs(config):
        return Decision("keep" if status.status == "done" else "run")
    if status.status != "done":
        return Decision("score", "it ran before, but was not scored")
    if result["scored"] != to_plain(config.metrics):
        return Decision("score", "other metrics are asked for")
    return Decision("keep")
