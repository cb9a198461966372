"""Hydra's side of the command line: compose, convert, run each experiment, and answer errors in one message.

Hydra prints the errors it meets itself, without the valid choices, and ends the process. With HYDRA_FULL_ERROR=1 it
raises them instead; that is set around it here, and taken back for the experiments and for what they start.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from qexp.composition import explain
from qexp.config import to_run_config
from qexp.errors import ConfigError, QexpError
from qexp.options import conf_folder
from qexp.schema import register_schemas
from qexp.settings import SweepConfig

if TYPE_CHECKING:
    from qexp.sweep.job import JobRow

FULL_ERROR = "HYDRA_FULL_ERROR"
INTERRUPTED = 130  # the shell's exit code for Ctrl-C


def run(arguments: Sequence[str]) -> int:
    """Run what the command line asks for; returns the exit code, 0 only if every experiment is done.

    A sweep's own end (`sweep/callback.py`) knows better and exits by itself.
    """
    wanted = os.environ.get(FULL_ERROR)
    not_done: list[JobRow] = []
    refusals: list[QexpError] = []  # of a single run; raised through Hydra they would be announced twice

    def job(cfg: DictConfig) -> JobRow | None:
        with environment(FULL_ERROR, wanted):
            SweepFolder.unused = None
            try:
                row = run_one(cfg)
            except QexpError as error:
                refusals.append(error)
                return None
            if row.status == "failed" or (row.status != "done" and not in_sweep()):
                not_done.append(row)
            return row

    register_schemas()
    try:
        sys.argv[1:] = defer_to_jobs(arguments)
        with environment(FULL_ERROR, "1"):
            hydra.main(config_path=str(conf_folder()), config_name="config", version_base="1.3")(job)()
        for refusal in refusals:
            raise refusal
    except KeyboardInterrupt:
        print("interrupted; what is done is kept, and the same command goes on from there", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        SweepFolder.remove_unused()
        if wanted == "1":
            raise
        print(f"error: {explain(error, arguments)}", file=sys.stderr)
        return 1
    return 1 if not_done else 0


def run_one(cfg: DictConfig) -> JobRow:
    """One composed experiment. A setting that is wrong ends a single run here; a sweep goes on with the next."""
    from qexp.sweep.job import refuse_job, run_job

    overrides = list(HydraConfig.get().overrides.task)
    try:
        config = to_run_config(cfg)
    except QexpError as error:
        if not in_sweep():
            raise
        return refuse_job(error, overrides, outputs=cfg.paths.outputs, sweep_name=cfg.sweep.name)
    row = run_job(config, overrides)
    if row.key and not in_sweep():
        print(f"  {Path(config.paths.outputs, 'runs', row.key)}", flush=True)
    return row


def in_sweep() -> bool:
    return bool(HydraConfig.get().mode == RunMode.MULTIRUN)


class SweepFolder(Callback):
    """A Hydra callback, ahead of the sweep's own: a sweep that does not compose leaves no folder behind."""

    unused: Path | None = None  # created for this sweep, in which nothing has run yet

    def on_multirun_start(self, config: DictConfig, **kwargs: object) -> None:
        try:
            SweepConfig(config.sweep.name)
        except ConfigError as error:  # Hydra would make it a warning
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)
        folder = Path(config.hydra.sweep.dir)
        SweepFolder.unused = None if folder.exists() else folder

    @classmethod
    def remove_unused(cls) -> None:
        if cls.unused is not None:
            shutil.rmtree(cls.unused, ignore_errors=True)


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


@contextmanager
def environment(name: str, value: str | None) -> Iterator[None]:
    """Set a variable, or unset it with None, and put back what was there."""
    before = os.environ.get(name)
    _set(name, value)
    try:
        yield
    finally:
        _set(name, before)


def _set(name: str, value: str | None) -> None:
    os.environ.pop(name, None)
    if value is not None:
        os.environ[name] = value
