"""The parent's side of one experiment: find out whether it has to run, have it run, record how it ended.

Hydra calls `run_job` once per experiment. A job that raised would hide the errors of all later ones and skip the
sweep's end, so everything becomes a row; only Ctrl-C goes through, after the run is marked.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from qexp.config.schema import RunConfig, SweepConfig
from qexp.errors import DiskError, LoadError, QexpError
from qexp.experiments.reference import saves_outputs
from qexp.experiments.stored import with_absolute_paths
from qexp.results.environment import differences
from qexp.results.labels import experiment_name, run_label, settings_label
from qexp.results.manifest import JobRow, Manifest, jobs_left
from qexp.results.outcome import Outcome, outcome_of
from qexp.results.run_folder import RunFolder, Status, now_iso
from qexp.sweep.console_lines import end_line, job_name
from qexp.sweep.damage import set_damage_aside
from qexp.sweep.live_display import DISPLAY
from qexp.sweep.log_writer import WRITER, log_run
from qexp.sweep.preload import modules_of
from qexp.sweep.reference import ensure_reference, known_reference, prepare_folder
from qexp.sweep.resume import Decision, decide, scored_names
from qexp.sweep.run_key import reference_key, run_key
from qexp.sweep.shared_weights import with_cache_folder
from qexp.sweep.worker import Work
from qexp.sweep.worker_console import WorkerConsole
from qexp.sweep.worker_process import run_inline, run_worker
from qexp.system.files import check_writable, read_yaml, write_bytes

__all__ = ["JobRow", "refuse_job", "run_job"]

ORDERS = ("config.yaml", "overrides.txt", "status.json")  # what scoring again replaces, beside the result
FILES_CHANGED = (
    "files of the model or of the task were changed while the experiment ran, so that its result is of neither; run it "
    "again"
)
TRACKED = {"offline": "wandb/offline-run-*", "online": "wandb/run-*"}  # what W&B leaves in a run folder, by mode


@dataclass(frozen=True)
class _Job:
    """One call of `run_job`: what to run, and where it stands in a sweep (number is None outside of one).

    sweep: the sweep's token.
    """

    config: RunConfig
    overrides: tuple[str, ...]
    number: int | None
    total: int | None
    sweep: str | None
    settings: str  # those that vary in the sweep, with their values
    work: Work

    @property
    def manifest(self) -> Manifest | None:
        return Manifest(self.config.paths.outputs, self.config.sweep.name) if self.number is not None else None

    @property
    def row(self) -> JobRow:
        """Its row as far as it is known before it runs."""
        return JobRow(self.number or 1, "", self.overrides, run_label(self.config.to_container()), "failed")

    @property
    def name(self) -> str:
        return job_name(self.number, self.total, experiment_name(self.row.label, self.settings))

    def say(self, message: str) -> None:
        print(f"{self.name}: {message}", flush=True)


def run_job(
    config: RunConfig,
    overrides: Sequence[str],
    *,
    key: str | None = None,
    number: int | None = None,
    experiment: str = Work.experiment,
    score: str = Work.score,
    check: str = Work.check,
) -> JobRow:
    """Run one experiment, or reuse its result. Raises nothing but KeyboardInterrupt; failures are in the row.

    key: its run key, None if it is to be computed. number: place in the sweep from 1, None to ask Hydra. experiment,
    score, check: see `worker.py`.
    """
    number = number if number is not None else _hydra_number()
    sweep = _read_sweep(Manifest(config.paths.outputs, config.sweep.name)) if number is not None else {}
    work = Work(Path(), experiment=experiment, score=score, check=check)
    settings = settings_label(overrides, sweep.get("varying") or ())
    job = _Job(config, tuple(overrides), number, sweep.get("total"), sweep.get("token"), settings, work)
    row = job.row
    if number is None or sweep.get("pid") == os.getpid():  # else others that run beside this one print there too
        DISPLAY.begin(job.name, jobs_left(sweep))
    try:
        key = run_key(config) if key is None else key
        config = with_cache_folder(config, sweep.get("varying") or ())
        job = replace(job, config=with_absolute_paths(config))  # later: errors before name files as they were typed
        row = replace(row, key=key)
        row = _perform(job, row)
        if sweep.get("pid") != os.getpid():  # else its end waits for all that is to be logged
            WRITER.close()
    except KeyboardInterrupt as error:
        row = replace(row, **asdict(outcome_of(error)))
        raise
    except Exception as error:  # whatever it is, the other experiments go on
        row = replace(row, **asdict(_explained(error)))
    finally:
        row = replace(row, kept=_kept_result(config, row))
        _record(job.manifest, row, job.name, config.paths.outputs)
        if number is None:
            DISPLAY.close()
    return row


def _kept_result(config: RunConfig, row: JobRow) -> str | None:
    """When the result began that a failed attempt has left as it was; None if there is none."""
    if row.status != "failed" or not row.key:
        return None
    with suppress(DiskError):
        status = RunFolder(Path(config.paths.outputs, "runs", row.key)).read_status()
        return status.started if status is not None and status.status == "done" else None
    return None


def refuse_job(
    error: QexpError,
    overrides: Sequence[str],
    *,
    outputs: str,
    sweep_name: str,
    label: str = "",
    number: int | None = None,
) -> JobRow:
    """Return the row of an experiment whose configuration does not resolve, recorded and shown like any other."""
    number = number if number is not None else _hydra_number()
    manifest = Manifest(outputs, sweep_name) if number is not None else None
    sweep = _read_sweep(manifest) if manifest is not None else {}
    settings = settings_label(overrides, sweep.get("varying") or ()) if label else ""
    label = label or " ".join(overrides) or "this experiment"
    row = JobRow(number or 1, "", tuple(overrides), label, **asdict(outcome_of(error)))
    name = job_name(number, sweep.get("total"), experiment_name(label, settings))
    if sweep.get("pid") == os.getpid():
        DISPLAY.begin(name, jobs_left(sweep))
    _record(manifest, row, name, outputs)
    return row


def _read_sweep(manifest: Manifest) -> dict[str, Any]:
    """Read the sweep's manifest; a damaged one is reported where the job is recorded."""
    with suppress(DiskError):
        return manifest.read() or {}
    return {}


def _perform(job: _Job, row: JobRow) -> JobRow:
    """Decide, run, track: one experiment with its folder locked."""
    folder = RunFolder(Path(job.config.paths.outputs, "runs", row.key))
    # a lock would make the folder of a run that is left alone
    if not folder.path.exists() and decide(job.config, folder).action == "keep":
        return _filled(row, folder, None, reused=False)
    with folder.locked(job.say, job.config.isolation.timeout_minutes):
        # again: another process may have finished it before this one had the lock
        decision = decide(job.config, folder, set_damage_aside(folder, job.say))
        if decision.action == "keep":
            status = folder.read_status()
            _say_what_differs(job, folder)
        else:
            if decision.action == "run":
                _check_before_clearing(job.config, folder)
            job.say(_start_words(decision))
            status = _score(job, folder) if decision.action == "score" else _execute(job, folder, None)
        rescored = decision.action == "score" and status is not None and status.status == "done"
        if status is not None and (decision.action == "run" or rescored or not _is_tracked(job, folder)):
            _track(job, folder)
        return replace(_filled(row, folder, status, reused=decision.action == "keep"), rescored=rescored)


def _say_what_differs(job: _Job, folder: RunFolder) -> None:
    """Say in which environment a reused result was made, if it is another: each once for a sweep."""
    result = folder.read_result()
    changed = ", ".join(differences(result["env"], job.config)) if result else ""
    if changed and (job.sweep, changed) not in _SAID:
        _SAID.add((job.sweep, changed))
        print(f"reused results were made in another environment: {changed}; resume=stale runs them again", flush=True)


_SAID: set[tuple[str | None, str]] = set()  # (token of a sweep, what differs)


def _check_before_clearing(config: RunConfig, folder: RunFolder) -> None:
    """Raise QexpError for what can be known while an earlier result is still there."""
    if config.save.path is not None:
        check_writable(Path(config.save.path), "save.path=")
    if saves_outputs(config) and folder.holds("result.json"):
        reference_key(config)


def _score(job: _Job, folder: RunFolder) -> Status:
    """Add the metrics that a run lacks to its result. If that fails, the run stays as it was."""
    previous = folder.read_result() or {}
    before = {name: (folder.path / name).read_bytes() for name in ORDERS if folder.holds(name)}
    was_done = (status := folder.read_status()) is not None and status.status == "done"
    names = tuple(dict.fromkeys((*scored_names(previous, job.config.metrics), *job.config.metrics.names)))
    config = replace(
        job.config, metrics=replace(job.config.metrics, names=names), sweep=_first_sweep(job.config, previous)
    )
    result: Status | None = None
    try:
        result = _execute(replace(job, config=config), folder, previous)
    finally:
        if was_done and (result is None or result.status != "done"):
            with suppress(DiskError):
                for name, content in before.items():
                    write_bytes(folder.path / name, content)
    return result


def _first_sweep(config: RunConfig, previous: Mapping[str, Any]) -> SweepConfig:
    """Return the sweep that ran an experiment first: it stays in this one's group, whoever scores it again."""
    stored = (previous.get("config") or {}).get("sweep")
    return SweepConfig(**stored) if stored else config.sweep


def _execute(job: _Job, folder: RunFolder, previous: Mapping[str, Any] | None) -> Status:
    """Run in a worker, the reference first, or score the run of a `previous` result; the returned status is on disk if
    the disk takes it."""
    if job.config.tracking.mode != "none" and job.config.isolation.mode == "process":
        WRITER.start()
    started = now_iso()
    try:
        run = _runner(job)
        prepare_folder(folder, job.config, job.overrides, clear=previous is None)
        work = replace(job.work, folder=folder.path, steps="run")
        if saves_outputs(job.config):
            reference = known_reference(job.config, (previous or {}).get("reference"))
            if reference is None:
                # the reference may take hours: what cannot run is refused before it
                check = partial(_find_refusal, job, folder, run) if previous is None else lambda: None
                run_reference = _runner(job, "reference")
                reference, status = ensure_reference(job.config, work, run_reference, job.say, job.sweep, check)
                if reference is None:
                    return status
                if status.status != "done":
                    outcome = Outcome(status.status, status.reason, f"its reference: {status.message}")
                    return _mark(folder, outcome, started)
            work = replace(work, reference=reference, steps="all" if previous is None else "score")
        status = run(work)
        # the worker read the files after the key was made of them
        if status.status == "done" and previous is None and run_key(job.config) != folder.key:
            raise LoadError(FILES_CHANGED)
        return status
    except BaseException as error:
        status = _mark(folder, _explained(error), started)
        if isinstance(error, KeyboardInterrupt):
            raise
        return status


def _find_refusal(job: _Job, folder: RunFolder, run: Callable[[Work], Status]) -> Status | None:
    """Return the outcome of an experiment that is known to fail before weights are read; None if it can run."""
    status = run(replace(job.work, folder=folder.path, steps="check"))
    if status.status != "done":
        return status
    prepare_folder(folder, job.config, job.overrides)
    return None


def _runner(job: _Job, of: str = "candidate") -> Callable[[Work], Status]:
    """Return a function that runs a worker for the candidate or its reference, and shows its messages."""
    config, console = job.config, WorkerConsole(of, job.number, job.total)
    if config.isolation.mode == "inline":
        return partial(run_inline, console=console)
    modules = modules_of(config) if job.work.experiment == Work.experiment else ()
    return partial(run_worker, isolation=config.isolation, modules=modules, console=console)


def _mark(folder: RunFolder, outcome: Outcome, started: str) -> Status:
    """Write how it ended where no worker could; a disk that takes nothing more has its own message already."""
    status = Status(**asdict(outcome), pid=os.getpid(), started=started, finished=now_iso())
    with suppress(DiskError):
        folder.write_status(status)
    return status


def _explained(error: BaseException) -> Outcome:
    """Return the outcome of an error on the parent's side; what is not meant for users is a defect, and shows where."""
    if not isinstance(error, QexpError | KeyboardInterrupt):
        traceback.print_exception(error)
    return outcome_of(error)


def _filled(row: JobRow, folder: RunFolder, status: Status | None, reused: bool) -> JobRow:
    """Return the row with how it ended; without a status it was left alone."""
    if status is None:
        return replace(row, status="skipped", message="not run: resume=failed runs only what has failed")
    result = folder.read_result() if status.status == "done" else None
    ending = {name: getattr(status, name) for name in ("status", "reason", "message", "seconds")}
    return replace(row, **ending, reused=reused, metrics=result["metrics"] if result else {})


def _is_tracked(job: _Job, folder: RunFolder) -> bool:
    """Return whether a run that is reused was tracked in this way before."""
    return any(folder.path.glob(TRACKED.get(job.config.tracking.mode, "*")))


def _track(job: _Job, folder: RunFolder) -> None:
    """Have a finished run logged to W&B from its folder, beside what runs next; in this process if that is inline."""
    status = folder.read_status()
    if job.config.tracking.mode == "none" or status is None or status.status not in ("done", "failed"):
        return
    if status.reason in ("config", "load") and not folder.holds("plan.json"):
        return  # refused before anything was loaded: there is no run to show
    log = log_run if job.config.isolation.mode == "inline" else WRITER.log
    log(folder.path, job.config, _group(job, folder), job.settings)


def _group(job: _Job, folder: RunFolder) -> str | None:
    """Return the W&B group of a run: the sweep that ran it first, None if that was a single run."""
    container = read_yaml(folder.path / "config.yaml") or {}
    name = str((container.get("sweep") or {}).get("name") or job.config.sweep.name)
    if job.number is not None and name == job.config.sweep.name:
        return name
    jobs = _read_sweep(Manifest(job.config.paths.outputs, name)).get("jobs", [])
    return name if any(other["key"] == folder.key for other in jobs) else None


def _record(manifest: Manifest | None, row: JobRow, name: str, outputs: str) -> None:
    """Add a row to the manifest, if there is one, and show how the experiment ended."""
    values: dict[str, Any] | None = None
    try:
        values = manifest.add(row) if manifest is not None else None
    except DiskError as error:
        print(f"warning: this experiment is missing in the sweep's manifest: {error}", file=sys.stderr)
    log = Path(outputs, "runs", row.key, "worker.log")
    DISPLAY.end(row, values, log if row.key and log.exists() else None)
    print(end_line(name, row, values), flush=True)


def _start_words(decision: Decision) -> str:
    verb = "scoring again" if decision.action == "score" else "started"
    return f"{verb} ({decision.why})" if decision.why else verb


def _hydra_number() -> int | None:
    """Return this job's place in a Hydra sweep, from 1; None in a single run, or without Hydra."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return None
    return int(HydraConfig.get().job.num) + 1
