"""The two ends of a Hydra sweep: its manifest before the first experiment, the table and the exit code after the last.

Hydra turns an exception in a callback into a warning and exits with 0, so everything here that must stop or fail a
sweep leaves through `sys.exit`.
"""

from __future__ import annotations

import math
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, Override, Sweep
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from qexp.errors import ConfigError, QexpError
from qexp.results.manifest import Manifest, count_line
from qexp.results.run_folder import remove_leftovers
from qexp.sweep.live_display import DISPLAY
from qexp.sweep.log_writer import WRITER


class SweepCallback(Callback):
    """Named in conf/config.yaml: `hydra.callbacks.qexp._target_`."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Create the sweep's folder and manifest, before a model is loaded for nothing."""
        if config.sweep.get("dry_run"):
            return
        try:
            arguments = sys.orig_argv[len(sys.orig_argv) - len(sys.argv) + 1 :]  # as typed: sys.argv may be edited
            command = ["python", "-m", "qexp", *arguments]
            remove_leftovers(Path(config.paths.outputs))
            _manifest(config).start(command, planned_jobs(config), config.sweep.get("notes"), swept_settings(config))
        except QexpError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the table and the count; exit with 1 if an experiment failed or left no record."""
        if config.sweep.get("dry_run"):
            return
        failed = True
        try:
            failed = _close(_manifest(config))
        except QexpError as error:
            print(error, file=sys.stderr)
        except Exception:  # Hydra would make it a warning, and the exit code 0
            traceback.print_exc()
        if failed:
            sys.exit(1)


def planned_jobs(config: DictConfig) -> int | None:
    """Return how many experiments the sweep will have; None if its sweeper decides as it goes, or for a glob."""
    if not str(config.hydra.sweeper.get("_target_", "")).endswith(("BasicSweeper", "QexpSweeper")):
        return None
    counts = [_number_of_values(sweep) for sweep in _sweeps(config).values()]
    return math.prod(count for count in counts if count is not None) if None not in counts else None


def swept_settings(config: DictConfig) -> list[str]:
    """Return names of the settings that differ between the experiments, whichever sweeper chooses their values."""
    return [name.lstrip("+") for name, sweep in _sweeps(config).items() if _number_of_values(sweep) != 1]


def check_lists(config: DictConfig) -> None:
    """Raise ConfigError for a list with a sweep in it, such as glob(*),none: Hydra would take glob(*) for one value."""
    for override in _sweeps(config).values():
        sweep, name = override.value(), override.key_or_group
        if isinstance(sweep, ChoiceSweep) and any(isinstance(value, Sweep | Glob) for value in sweep.list):
            raise ConfigError(
                f"{override.input_line}: glob(...), range(...) and choice(...) cannot be part of a list; list every "
                f"value, such as {name}=a,b, or give one of them alone"
            )


def _sweeps(config: DictConfig) -> dict[str, Override]:
    """Return the overrides with several values, by name: the sweeper's own settings, and the typed ones."""
    lines = [f"{name}={values}" for name, values in (config.hydra.sweeper.get("params") or {}).items()]
    parser, parsed = OverridesParser.create(), {}
    for line in (*lines, *config.hydra.overrides.task):
        with suppress(HydraException):  # the sweeper reports it
            override = parser.parse_override(line)
            parsed[override.get_key_element()] = override  # the last one of a name wins
    return {name: override for name, override in parsed.items() if override.is_sweep_override()}


def _number_of_values(sweep: Override) -> int | None:
    """Return how many values a sweep has, None if that is not known here: of a glob, or an interval."""
    try:
        return len(list(sweep.sweep_string_iterator()))
    except HydraException:
        return None


def _close(manifest: Manifest) -> bool:
    """Note and print how the sweep ended; whether anything in it failed."""
    values = manifest.finish()
    jobs, total = values["jobs"], values["total"]
    print_table(manifest)
    return any(job["status"] == "failed" for job in jobs) or len(jobs) < (total or 0)


def print_table(manifest: Manifest) -> None:
    """Print the results of a sweep so far, once all that is to be logged is."""
    from qexp.report.table import format_table, rows_of_sweep

    WRITER.close()
    DISPLAY.close()
    values = manifest.read() or {"jobs": [], "total": None}
    try:
        print(f"\n{format_table(rows_of_sweep(manifest.folder.parents[1], manifest.name))}\n")
    finally:
        print(count_line(values["jobs"], values["total"]), flush=True)


def _manifest(config: DictConfig) -> Manifest:
    return Manifest(config.paths.outputs, config.sweep.name)
