"""The process in which one experiment runs: `python -m qexp.sweep.worker <folder>`.

Reads config.yaml, runs the experiment, scores its outputs, and writes result.json, then status.json. Whatever happens,
short of the process being killed, status.json says how it ended; the traceback of a failure goes to worker.log.

    --score-only    score the outputs of a run that is already there, for the metrics that its result lacks
    --no-score      run only (references are compared with nothing)
    --check-only    find out whether it can run, as far as that is known before weights are read
    --experiment    module:function to run instead of the program's own, `(config, folder) -> metrics`; tests use it
    --score         module:function to score with, `(config, folder, reference) -> metrics`
    --check         module:function to check with, `(config, folder) -> None`
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import math
import os
import random
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from qexp.config.schema import PERCEPTUAL_METRICS, RunConfig
from qexp.errors import DiskError, LoadError
from qexp.experiments.stored import run_config_from_container
from qexp.metrics.registry import find_metric
from qexp.results.environment import describe_environment
from qexp.results.outcome import DONE, outcome_of
from qexp.results.run_folder import BESIDE, RunFolder, Status, now_iso, start_ticks
from qexp.sweep.preload import import_modules, modules_of
from qexp.sweep.resume import scored_names
from qexp.system.child_process import adopt_orphans, die_with_parent
from qexp.system.files import read_json, read_yaml
from qexp.system.screen import open_screen, say
from qexp.system.stages import Stage, show_stage

Metrics = dict[str, float | None]
SCHEMA = 1
INLINE = "isolation=inline: the process holds more than this experiment; isolation=process measures it"


@dataclass(frozen=True)
class Work:
    """One worker's orders; `arguments` puts them on its command line."""

    folder: Path
    steps: Literal["all", "run", "score", "check"] = "all"
    reference: Path | None = None
    experiment: str = "qexp.sweep.worker:seeded_experiment"
    score: str = "qexp.scoring.score:score"
    check: str = "qexp.experiments.run:check_experiment"
    start: Literal["inline", "spawn", "fork"] = "inline"  # how the process that does it was started

    def arguments(self) -> list[str]:
        steps = {"all": [], "run": ["--no-score"], "score": ["--score-only"], "check": ["--check-only"]}[self.steps]
        reference = ["--reference", str(self.reference)] if self.reference else []
        functions = ["--experiment", self.experiment, "--score", self.score, "--check", self.check]
        return [str(self.folder), *steps, *reference, *functions]


def seeded_experiment(config: RunConfig, folder: Path) -> Metrics:
    """Return the program's own experiment, with every global random generator seeded."""
    import numpy as np
    import torch

    import_modules(modules_of(config))  # before memory is measured: what is imported is not the experiment's
    from qexp.experiments.run import run_experiment

    random.seed(config.seed)
    np.random.seed(config.seed % 2**32)  # numpy takes 32 bits, torch 64
    torch.manual_seed(config.seed)
    return dict(run_experiment(config, folder))


def do_work(work: Work) -> Status:
    """Do one worker's work in this process; what it raises ends up in the returned status, which is also on disk."""
    folder = RunFolder(work.folder)
    before = folder.read_status() if work.steps == "score" else None
    running = Status("running", os.getpid(), now_iso(), ticks=start_ticks(os.getpid()))
    started = time.monotonic()
    outcome = DONE
    try:
        folder.write_status(running)
        if work.steps == "check":
            config = _read_config(folder)
            folder.write_json("env.json", describe_environment(config))
            _function(work.check)(config, folder.path)
        else:
            folder.write_json("result.json", _make_result(work, folder))
    # SystemExit and KeyboardInterrupt too: whatever ends the work must be in status.json
    except BaseException as error:
        outcome = outcome_of(error)
        _log_traceback(folder)
        if outcome.reason == "error":
            outcome = replace(outcome, message=f"{outcome.message}; traceback in {folder.path / 'worker.log'}")
        if isinstance(error, KeyboardInterrupt):
            raise
    finally:
        seconds = round(before.seconds if before else time.monotonic() - started, 3)
        status = replace(running, **asdict(outcome), finished=now_iso(), seconds=seconds, ticks=None)
        # first: a folder whose status is final has nothing left over
        folder.remove_scratch()
        folder.write_status(status)
    return status


def _read_config(folder: RunFolder) -> RunConfig:
    container = read_yaml(folder.path / "config.yaml")
    if container is None:
        raise LoadError(f"{folder.path} has no config.yaml, which says what to run; run the experiment's command again")
    return run_config_from_container(container)


def _make_result(work: Work, folder: RunFolder) -> dict[str, Any]:
    """Run and score as ordered; the contents of result.json."""
    config = _read_config(folder)
    wanted = config
    if work.steps == "score":
        earlier = _earlier(folder)
        metrics, environment, notes = dict(earlier["metrics"]), earlier["env"], earlier.get("notes", {})
        for name in PERCEPTUAL_METRICS.keys() - {*scored_names(earlier, config.metrics)}:
            metrics.pop(f"quality/{name}", None)  # of other settings
        wanted = replace(config, metrics=replace(config.metrics, names=_lacking(config, earlier, work.reference)))
    else:
        environment = describe_environment(config)
        folder.write_json("env.json", environment)
        metrics, notes = _meaningful(dict(_function(work.experiment)(config, folder.path)), config.isolation.mode)
    if work.steps != "run":
        show_stage(Stage("scoring"))
        metrics |= _function(work.score)(wanted, folder.path, work.reference)
    return {
        "schema": SCHEMA,
        "key": folder.key,
        "status": "done",
        "config": config.to_container(),
        "metrics": _finite(metrics),
        "notes": notes,
        "formats": _formats(folder),
        "beside": (read_json(folder.path / BESIDE) or {}).get("processes", []),
        "scored": config.metrics.scored() if work.steps != "run" else None,
        "reference": work.reference.name if work.reference else None,
        "start": work.start,
        "env": environment,
    }


def _meaningful(metrics: Metrics, isolation: str) -> tuple[Metrics, dict[str, str]]:
    """Return (metrics, why some of them are null): inline, the memory of the process is also the caller's."""
    if isolation != "inline":
        return metrics, {}
    of_process = [name for name in metrics if (metric := find_metric(name)) is not None and metric.is_of_process]
    return {**metrics, **dict.fromkeys(of_process)}, dict.fromkeys(of_process, INLINE)


def _formats(folder: RunFolder) -> dict[str, Any]:
    """Component -> format -> its layers and bits, from plan.json."""
    plans = read_json(folder.path / "plan.json") or {}
    return {component: plan["formats"] for component, plan in plans.items() if "formats" in plan}


def _earlier(folder: RunFolder) -> dict[str, Any]:
    """Return the result that is there already."""
    result = folder.read_result()
    if result is None:
        raise LoadError(f"{folder.path} has no result.json whose outputs could be scored; run it without --score-only")
    return result


def _lacking(config: RunConfig, earlier: Mapping[str, Any], reference: Path | None) -> tuple[str, ...]:
    """Return the metrics that an earlier result lacks; all of them if none is, or if the reference is another."""
    is_same = earlier.get("reference") == (reference.name if reference else None)
    known = scored_names(earlier, config.metrics) if is_same else ()
    return tuple(name for name in config.metrics.names if name not in known) or config.metrics.names


def _finite(metrics: Mapping[str, float | None]) -> Metrics:
    """JSON has no infinity and no NaN: they become null, and the log says so."""
    for name, value in metrics.items():
        if value is not None and not math.isfinite(value):
            say(f"warning: {name} is {value}; result.json holds null")
    return {name: value if value is not None and math.isfinite(value) else None for name, value in metrics.items()}


def _log_traceback(folder: RunFolder) -> None:
    """Append the exception being handled to worker.log; to stderr too with HYDRA_FULL_ERROR=1."""
    text = traceback.format_exc()
    if os.environ.get("HYDRA_FULL_ERROR", "0") != "0":
        say(text)
    try:
        with (folder.path / "worker.log").open("a", encoding="utf-8") as log:
            log.write(text)
    except OSError as error:
        say(f"warning: no traceback in worker.log: {error}")


def _function(name: str) -> Callable[..., Mapping[str, float | None]]:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def main(typed: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m qexp.sweep.worker", description="Run one experiment's folder.")
    parser.add_argument("folder", type=Path, help="outputs/runs/<key>, with config.yaml in it")
    parser.add_argument("--score-only", dest="steps", action="store_const", const="score", default="all")
    parser.add_argument("--no-score", dest="steps", action="store_const", const="run")
    parser.add_argument("--check-only", dest="steps", action="store_const", const="check")
    parser.add_argument("--reference", type=Path, help="folder of the reference to compare with")
    parser.add_argument("--experiment", default=Work.experiment, metavar="MODULE:FUNCTION")
    parser.add_argument("--score", default=Work.score, metavar="MODULE:FUNCTION")
    parser.add_argument("--check", default=Work.check, metavar="MODULE:FUNCTION")
    parser.add_argument("--parent", type=int, help="end when this process does")
    parser.add_argument("--start", default="spawn", choices=("spawn", "fork"), help="how this process was started")
    parser.add_argument("--screen", type=int, help="descriptor to show this program's own lines on; the rest is a log")
    arguments = vars(parser.parse_args(typed))
    parent, screen = arguments.pop("parent"), arguments.pop("screen")
    if screen is not None:
        open_screen(screen)
    if parent is not None:
        die_with_parent(parent)
        adopt_orphans()
    faulthandler.enable()
    try:
        status = do_work(Work(**arguments))
    except DiskError as error:
        say(error)
        return 1
    return 0 if status.status == "done" else 1


if __name__ == "__main__":
    sys.exit(main())
