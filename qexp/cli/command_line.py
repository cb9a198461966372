"""Hydra's side of the command line: compose, convert, run each experiment, and answer errors in one message.

Hydra prints the errors it meets itself, without the valid choices, and ends the process. With HYDRA_FULL_ERROR=1 it
raises them instead; that is set around it here, and taken back for the experiments and for what they start.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from qexp.cli.dry_run import Preview
from qexp.cli.flags import flags_first
from qexp.cli.hydra_errors import explain
from qexp.config.dataclass_io import convert
from qexp.config.hydra_schema import register_schemas
from qexp.config.objectives import check_sweeper, objective_values
from qexp.config.schema import PathsConfig, SweepConfig
from qexp.config.yaml_options import conf_folder
from qexp.errors import QexpError
from qexp.experiments.resolve import to_run_config
from qexp.results.labels import experiment_name, run_label, settings_label
from qexp.results.manifest import JobRow, Manifest
from qexp.sweep.callback import check_lists, swept_settings
from qexp.sweep.console_lines import job_name
from qexp.system.signals import Terminated, ending_signals_interrupt
from qexp.system.variables import variables_set
from qexp.tracking.session import check_login

FULL_ERROR = "HYDRA_FULL_ERROR"
DEFAULT_NAME = r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d"  # of a sweep in conf/sweep/default.yaml: when it began
INTERRUPTED = 130  # the shell's exit code for Ctrl-C


def run(arguments: Sequence[str]) -> int:
    """Run what the command line asks for; returns the exit code, 0 only if every experiment is done.

    A sweep's own end (`sweep/callback.py`) knows better and exits by itself.
    """
    wanted = os.environ.get(FULL_ERROR)
    typed: dict[str, str] = {}  # argument as Hydra gets it -> as it was typed
    not_done: list[JobRow] = []
    refusals: list[QexpError] = []  # of a single run; raised through Hydra they would be announced twice

    def job(cfg: DictConfig) -> JobRow | float | tuple[float, ...] | None:
        with variables_set({FULL_ERROR: wanted}):
            if cfg.sweep.get("dry_run"):
                preview_one(cfg, preview)
                return None
            SweepFolder.unused = None
            try:
                row = run_one(cfg)
            except QexpError as error:
                refusals.append(error)
                return None
            if row.status == "failed" or (row.status != "done" and not in_sweep()):
                not_done.append(row)
            names = cfg.sweep.get("objectives")
            return objective_values(list(names), row.metrics if row.status == "done" else {}) if names else row

    preview = Preview()
    register_schemas()
    try:
        sorted_arguments = flags_first(arguments)
        sys.argv[1:] = defer_to_jobs(sorted_arguments)
        typed.update(zip(sys.argv[1:], sorted_arguments, strict=True))
        with variables_set({FULL_ERROR: "1"}), ending_signals_interrupt():
            hydra.main(config_path=str(conf_folder()), config_name="config", version_base="1.3")(job)()
        for refusal in refusals:
            raise refusal
        if preview.counts:
            print(preview.summary())
            SweepFolder.remove_unused()
    except KeyboardInterrupt as error:
        if SweepFolder.is_dry or preview.counts:
            SweepFolder.remove_unused()
            print(f"interrupted: {preview.summary()}")
            return INTERRUPTED
        print("interrupted; what is done is kept, and the same command goes on from there", file=sys.stderr)
        return 128 + error.number if isinstance(error, Terminated) else INTERRUPTED
    except SystemExit:
        SweepFolder.remove_unused()
        raise
    except Exception as error:
        SweepFolder.remove_unused()
        if wanted == "1":
            raise
        message = explain(error, arguments)
        for sent, original in typed.items():
            message = message.replace(sent, original)
        print(f"error: {message}", file=sys.stderr)
        return 1
    return 1 if not_done or preview.counts["fail"] else 0


def run_one(cfg: DictConfig) -> JobRow:
    """Return one composed experiment. A setting that is wrong ends a single run here; a sweep goes on with the next."""
    from qexp.sweep.job import refuse_job, run_job
    from qexp.sweep.run_key import run_key

    overrides = typed_overrides()
    try:
        config = to_run_config(cfg)
        key = run_key(config)  # opens every file: one that is wrong is an error of the command line, too
    except QexpError as error:
        if not in_sweep():
            raise
        label = raw_label(cfg)
        return refuse_job(error, overrides, outputs=cfg.paths.outputs, sweep_name=cfg.sweep.name, label=label)
    if config.tracking.mode == "online" and not in_sweep():
        check_login()
    row = run_job(config, overrides, key=key)
    folder = Path(config.paths.outputs, "runs", row.key)
    if row.key and folder.exists() and not in_sweep():
        print(f"  {folder}", flush=True)
    return row


def typed_overrides() -> list[str]:
    """Return the overrides as they were typed: ${…} in one refers to settings that Hydra's own node does not have."""
    return OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)  # type: ignore[return-value]


def preview_one(cfg: DictConfig, preview: Preview) -> None:
    """Say what one composed experiment would do."""
    overrides = typed_overrides()
    settings = settings_label(overrides, SweepFolder.varying) if in_sweep() else ""
    number = HydraConfig.get().job.num + 1 if in_sweep() else None
    try:
        preview.show(to_run_config(cfg), number, settings)
    except QexpError as error:
        label = raw_label(cfg)
        shown = experiment_name(label, settings) if label else " ".join(overrides)
        preview.refuse(job_name(number, None, shown), error)


def raw_label(cfg: DictConfig) -> str:
    """Return the label of an experiment that does not resolve; '' if not even its parts have names."""
    try:
        parts = {
            name: OmegaConf.to_container(cfg[name], resolve=True) for name in ("model", "backend", "offload", "task")
        }
        return run_label({**parts, "components": {"": {"backend": parts["backend"]}}})
    except (KeyError, TypeError, ValueError, OmegaConfBaseException):
        return ""


def in_sweep() -> bool:
    return bool(HydraConfig.get().mode == RunMode.MULTIRUN)


class SweepFolder(Callback):
    """A Hydra callback, ahead of the sweep's own: it has a folder to itself, and W&B an account, before anything runs.

    A sweep that does not compose leaves no folder behind.
    """

    unused: Path | None = None  # created for this sweep, in which nothing has run yet
    is_dry = False
    varying: Sequence[str] = ()  # names of the settings that differ between its experiments

    def on_multirun_start(self, config: DictConfig, **kwargs: object) -> None:
        try:
            check_lists(config)
            objectives = convert(tuple[str, ...], _plain(config.sweep.get("objectives") or []), "sweep.objectives")
            SweepConfig(config.sweep.name, objectives=objectives)
            check_sweeper(objectives, _plain(config.hydra.sweeper), bool(config.sweep.get("dry_run")))
            PathsConfig(config.paths.outputs)
            if config.tracking.get("mode") == "online":
                check_login()
        except QexpError as error:  # Hydra would make it a warning
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)
        SweepFolder.varying = swept_settings(config)
        folder = Path(config.hydra.sweep.dir)
        SweepFolder.unused, SweepFolder.is_dry = None if folder.exists() else folder, bool(config.sweep.get("dry_run"))
        if re.fullmatch(DEFAULT_NAME, config.sweep.name):
            _take_free_name(config, folder)

    @classmethod
    def remove_unused(cls) -> None:
        """Remove what is still empty: with other launchers, experiments ran in other processes, which cannot say so."""
        if cls.unused is not None and not (Manifest(cls.unused.parents[1], cls.unused.name).read() or {}).get("jobs"):
            shutil.rmtree(cls.unused, ignore_errors=True)
            with suppress(OSError):  # unless other sweeps are there
                cls.unused.parent.rmdir()
                cls.unused.parent.parent.rmdir()


def _plain(node: Any) -> Any:
    return OmegaConf.to_container(node) if OmegaConf.is_config(node) else node


def _take_free_name(config: DictConfig, folder: Path) -> None:
    """Another sweep that began in the same second has the name: add a number to it, for every experiment."""
    for number in itertools.count(1):
        own = folder.with_name(f"{folder.name}_{number}") if number > 1 else folder
        try:
            own.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError:  # it cannot be written at all: the manifest says so
            return
        SweepFolder.unused = own
        if number > 1:
            with read_write(config), open_dict(config):
                config.sweep.name = own.name
                config.hydra.overrides.task.append(f"sweep.name={own.name}")
        return


def defer_to_jobs(arguments: Sequence[str]) -> list[str]:
    """Sweep over a group's fields with the group: `backend=a,b backend.x=1` becomes `backend=a,b backend.x=choice(1)`.

    Hydra composes a sweep once without its swept groups, where `backend.x=1` would meet the default backend, which may
    have no such field. A choice of one is applied in each experiment only.
    """
    parser = OverridesParser.create()
    parsed = {}
    for argument in arguments:
        with suppress(HydraException):  # a flag or its value; if it is a mistake, Hydra reports it
            parsed[argument] = parser.parse_override(argument)
    swept = {override.key_or_group for override in parsed.values() if override.is_sweep_override()}

    def deferred(argument: str) -> str:
        override = parsed.get(argument)
        if override is None or override.is_sweep_override() or override.is_delete():
            return argument
        group, dot, _ = override.key_or_group.partition(".")
        key, _, value = argument.partition("=")
        return f"{key}=choice({value})" if dot and group in swept else argument

    return [deferred(argument) for argument in arguments]
