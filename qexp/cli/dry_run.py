"""sweep.dry_run=true: say what would run, what would be reused, and what it takes; run nothing, write nothing.

Bytes are those of the loading plan. Times are medians of earlier runs in the same outputs folder: of the same model,
task and backend, else of the same model and task, as the line says.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from qexp.config.schema import RunConfig
from qexp.errors import DiskError, QexpError
from qexp.experiments.stored import with_absolute_paths
from qexp.results.labels import backend_label, experiment_name, model_label, run_label
from qexp.results.numbers import format_memory
from qexp.results.run_folder import RunFolder
from qexp.sweep.console_lines import job_name
from qexp.sweep.reference import reference_is_there
from qexp.sweep.resume import Decision, decide
from qexp.sweep.run_key import run_key
from qexp.system.memory import GIB

VERBS = {"run": "would run", "score": "would be scored again", "keep": "would be reused"}


class Preview:
    """What was said of the experiments of one command."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.seconds = 0.0
        self.unknown = 0  # experiments whose time cannot be estimated

    def show(self, config: RunConfig, number: int | None, settings: str) -> None:
        """Print the line of one experiment; an error of its plan is one, and counts.

        settings: those that vary in its sweep, see `settings_label`.
        """
        name = job_name(number, None, experiment_name(run_label(config.to_container()), settings))
        try:
            folder = RunFolder(Path(config.paths.outputs, "runs", run_key(config)))
            decision, nbytes = decide(with_absolute_paths(config), folder), weights_bytes(config)
            if decision.action == "run":
                reference_is_known = reference_is_there(config)
        except QexpError as error:
            self.refuse(name, error)
            return
        words = [f"{VERBS[decision.action]}{_say_why(decision, folder)}", f"weights {format_memory(nbytes / GIB)}"]
        if decision.action == "run":
            words += [] if reference_is_known else ["its reference first"]
            words.append(self._time(config))
        self.counts[decision.action] += 1
        print(f"{name}: {', '.join(words)}", flush=True)

    def refuse(self, name: str, error: QexpError) -> None:
        self.counts["fail"] += 1
        print(f"{name}: cannot run: {error}", flush=True)

    def _time(self, config: RunConfig) -> str:
        estimate = estimate_seconds(config)
        if estimate is None:
            self.unknown += 1
            return "time unknown"
        self.seconds += estimate[0]
        return f"about {estimate[0]:.1f} s ({estimate[1]})"

    def summary(self) -> str:
        """'4 experiments: 2 would run, 1 would be reused, 1 cannot run; about 8.2 s (1 unknown). Nothing was run.'"""
        total = sum(self.counts.values())
        parts = [f"{self.counts[action]} {verb}" for action, verb in VERBS.items() if self.counts[action]]
        parts += [f"{self.counts['fail']} cannot run"] if self.counts["fail"] else []
        unknown = f" ({self.unknown} unknown)" if self.unknown else ""
        known = f"about {self.seconds:.1f} s{unknown}" if self.unknown < self.counts["run"] else "time unknown"
        time = f"; {known}" if self.counts["run"] else ""
        counts = f": {', '.join(parts)}{time}" if parts else ""
        return f"{total} experiment{'' if total == 1 else 's'}{counts}. Nothing was run."


def weights_bytes(config: RunConfig) -> int:
    """Return bytes of the weights of all components, once loaded. Raises the errors of the plan."""
    container = config.to_container()
    key = json.dumps([container["model"], container["components"], config.device], sort_keys=True)
    if key not in _KNOWN:
        from qexp.loading.forecast import forecast_components
        from qexp.models.base import load_source
        from qexp.system.screen import sayings_in

        with sayings_in([]):  # an experiment says it when it runs
            found, failed = forecast_components(load_source(config.model), config, config.offload)
        for error in failed.values():
            raise error
        _KNOWN[key] = sum(forecast.result_bytes for forecast in found.values())
    return _KNOWN[key]


_KNOWN: dict[str, int] = {}  # bytes of weights by model, components and device: the same for every seed and offload


def estimate_seconds(config: RunConfig) -> tuple[float, str] | None:
    """(median, of what) of earlier runs; None if there are none like it."""
    container = config.to_container()
    wanted = (model_label(container), container["task"]["name"], backend_label(container))
    runs = earlier_runs(config.paths.outputs)
    same = [seconds for label, seconds in runs if label == wanted]
    if same:
        return statistics.median(same), f"median of {len(same)} run{'s' * (len(same) > 1)} with this backend"
    similar = [seconds for label, seconds in runs if label[:2] == wanted[:2]]
    return (statistics.median(similar), f"median of {len(similar)} with other backends") if similar else None


@cache
def earlier_runs(outputs: str) -> Sequence[tuple[tuple[str, str, str], float]]:
    """((model, task, backend), seconds) of every finished run in an outputs folder."""
    found = []
    for path in Path(outputs).glob("runs/*/result.json"):
        with suppress(DiskError, KeyError, TypeError, AttributeError):
            folder = RunFolder(path.parent)
            result, status = folder.read_result(), folder.read_status()
            if result is not None and status is not None and status.status == "done":
                config: dict[str, Any] = result["config"]
                label = (model_label(config), config["task"]["name"], backend_label(config))
                found.append((label, status.seconds))
    return found


def _say_why(decision: Decision, folder: RunFolder) -> str:
    return f" from {folder.key}" if decision.action == "keep" else f" ({decision.why})" if decision.why else ""
