"""Hydra's basic sweeper, for thousands of experiments: each is composed when its turn comes, and forgotten afterwards.

Hydra's own composes all of them twice, the first time before anything runs, and keeps every configuration. What does
not compose is then an error of the whole sweep. Here the options and values that are typed are tried first, up to a
number of them, so that most mistakes are still found before anything runs; one that is found later costs its own
experiment. Other launchers, which start jobs elsewhere, get all of them at once, as from Hydra's.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qexp.cli.hydra_errors import explain
from qexp.errors import ConfigError, QexpError
from qexp.results.manifest import Manifest

MOST_TRIED = 20  # compositions before the first experiment, an eighth of a second each


class SweepAsItComes(BasicSweeper):
    """See above. Needs the settings of qexp's configuration: paths.outputs and sweep.name."""

    launcher: Launcher | None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """See Hydra's; a dry run stays in this process, whatever the launcher, since it counts what it says."""
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)
        if config.sweep.get("dry_run") and not isinstance(self.launcher, BasicLauncher):
            self.launcher = BasicLauncher()
            self.launcher.setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def sweep(self, arguments: list[str]) -> list[Any]:
        """Run all experiments; returns what each returned."""
        if not isinstance(self.launcher, BasicLauncher):
            return list(super().sweep(arguments))
        assert self.config is not None and self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        overrides = parser.parse_overrides([*self._parse_config(), *arguments])
        (jobs,) = self.split_arguments(overrides, None)
        if not jobs:
            raise ConfigError(empty_sweep_message(overrides))
        if not self.config.sweep.get("dry_run"):
            folder = Path(self.config.hydra.sweep.dir)
            folder.mkdir(parents=True, exist_ok=True)
            OmegaConf.save(self.config, folder / "multirun.yaml")
        groups = self.hydra_context.config_loader.list_groups("")
        self.validate_batch_is_legal(list(with_each_value(jobs, groups, MOST_TRIED)))
        try:
            return [self._run(number, job) for number, job in enumerate(jobs)]
        except KeyboardInterrupt:  # Hydra then calls no end of the sweep
            if self.config.sweep.get("dry_run"):
                raise
            from qexp.sweep.callback import print_table

            with suppress(QexpError):
                print_table(Manifest(self.config.paths.outputs, self.config.sweep.name))
            raise

    def _run(self, number: int, job: Sequence[str]) -> Any:
        assert self.launcher is not None
        try:
            (outcome,) = self.launcher.launch([job], initial_job_idx=number)
        except (HydraException, OmegaConfBaseException) as error:
            return self._refuse(number, job, error)
        return outcome.return_value  # raises what the job raised

    def _refuse(self, number: int, job: Sequence[str], error: Exception) -> Any:
        from qexp.sweep.job import refuse_job

        assert self.config is not None
        message = ConfigError(explain(error, sys.argv[1:]))
        place = {"outputs": self.config.paths.outputs, "sweep_name": self.config.sweep.name}
        return refuse_job(message, job, **place, number=number + 1)


def empty_sweep_message(overrides: Sequence[Override]) -> str:
    """Say which override of a sweep has no value, so that there is no experiment."""
    swept = [item for item in overrides if item.is_sweep_override()]
    empty = [item for item in swept if not list(item.sweep_string_iterator())] or swept
    shown = ", ".join(str(item.input_line or item.key_or_group) for item in empty)
    return f"{shown} has no value, so the sweep has no experiment; give one or more, such as seed=1,2"


def with_each_value(jobs: Sequence[Sequence[str]], groups: Sequence[str], most: int) -> Iterator[Sequence[str]]:
    """Return jobs in which each override occurs at least once, those that choose an option of a group first."""
    first_with: dict[str, Sequence[str]] = {}
    for job in jobs:
        for override in job:
            first_with.setdefault(override, job)
    seen: set[str] = set()
    ordered = sorted(
        first_with, key=lambda override: override.partition("=")[0].lstrip("+").partition("@")[0] not in groups
    )
    for override in ordered:
        if override not in seen and most > 0:
            most -= 1
            seen.update(first_with[override])
            yield first_with[override]
