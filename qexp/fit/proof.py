"""The proof: every contestant runs end to end, as one sweep, on samples that no score was made with."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qexp.config.hydra_schema import compose_settings
from qexp.errors import ConfigError
from qexp.experiments.resolve import to_run_config
from qexp.fit.contestants import Contestant
from qexp.fit.opened import OpenedModel
from qexp.metrics.registry import Metric, all_metrics
from qexp.results.manifest import Manifest
from qexp.results.samples import read_samples
from qexp.sweep.job import run_job
from qexp.sweep.log_writer import WRITER
from qexp.sweep.run_key import run_key
from qexp.system.memory import GIB

PREFERRED = ("quality/psnr_db", "quality/kl_divergence", "quality/relative_l2", "quality/perplexity")
Sample = tuple[str, str]  # (seed, sample)


@dataclass(frozen=True)
class Proven:
    """A contestant and what its runs measured.

    samples: metric -> sample -> (value, weight); weights_bytes: as loaded; peak_bytes: the highest of loading and of
    running, on the device, or of the process where the CPU computes; step_ms: the slowest run's median; problem: why
    there is no result, '' if there is one.
    """

    contestant: Contestant
    samples: Mapping[str, Mapping[Sample, tuple[float, float]]] = field(default_factory=dict)
    weights_bytes: int = 0
    peak_bytes: int = 0
    step_ms: float = 0.0
    problem: str = ""
    folders: tuple[Path, ...] = ()

    def values(self, metric: Metric) -> dict[Sample, float]:
        return {sample: value for sample, (value, _) in self.samples.get(metric.name, {}).items()}

    def weights(self, metric: Metric) -> dict[Sample, float]:
        return {sample: weight for sample, (_, weight) in self.samples.get(metric.name, {}).items()}

    def mean(self, metric: Metric) -> float:
        """Return the metric over all samples of all runs; infinite where every sample is identical to the reference."""
        found = [pair for pair in self.samples[metric.name].values() if math.isfinite(pair[0])]
        if not found:
            return math.inf
        mean = math.fsum(value * weight for value, weight in found) / math.fsum(weight for _, weight in found)
        return math.exp(mean) if metric.of_mean == "exp" else mean


def run_proof(
    opened: OpenedModel, contestants: Sequence[Contestant], variants: Sequence[Sequence[str]], name: str
) -> list[Proven]:
    """Run every contestant with every variant, as the sweep `name`; finished runs are reused."""
    manifest = Manifest(opened.config.paths.outputs, name)
    manifest.start([*sys.argv], len(contestants) * len(variants), "the proof of a fit")
    number, proven = 0, []
    try:
        for contestant in contestants:
            runs = []
            for variant in variants:
                number += 1
                runs.append(_run(opened, (*contestant.overrides, *variant), name, number))
            proven.append(_measured(contestant, runs, opened.config.device))
    finally:
        WRITER.close()  # what is still to be logged to W&B
        manifest.finish()
    return proven


@dataclass(frozen=True)
class _Run:
    folder: Path
    metrics: Mapping[str, float | None]
    problem: str


def _run(opened: OpenedModel, words: Sequence[str], name: str, number: int) -> _Run:
    config = to_run_config(compose_settings([*opened.overrides, *words, f"++sweep.name={name}"]))
    row = run_job(config, words, number=number)
    folder = Path(config.paths.outputs, "runs", row.key or run_key(config))
    return _Run(folder, row.metrics, "" if row.status == "done" else f"{row.status}: {row.message}")


def _measured(contestant: Contestant, runs: Sequence[_Run], device: str) -> Proven:
    problems = [run.problem for run in runs if run.problem]
    if problems:
        return Proven(contestant, problem=problems[0])
    samples: dict[str, dict[Sample, tuple[float, float]]] = {}
    for run in runs:
        for metric, values in read_samples(run.folder).items():
            samples.setdefault(metric, {}).update(values)
    of_device = "host" if device == "cpu" else "device"
    peak_names = (f"load/peak_{of_device}_gib", f"memory/run_peak_{of_device}_gib")
    peaks = [run.metrics.get(name) or 0.0 for run in runs for name in peak_names]
    steps = [run.metrics.get("time/step_ms") or 0.0 for run in runs]
    nbytes = {round((run.metrics["memory/weights_gib"] or 0) * GIB) for run in runs}
    folders = tuple(run.folder for run in runs)
    return Proven(contestant, samples, max(nbytes), round(max(peaks) * GIB), max(steps), "", folders)


def compared_metric(proven: Sequence[Proven], wanted: Metric | None) -> Metric:
    """Return the metric that decides: the one of the bound, else the first of some that every result has samples of.

    Raises: ConfigError where there is none.
    """
    done = [one for one in proven if not one.problem]
    if not done:
        raise ConfigError("nothing is proven: no experiment of the proof ended well; their lines above say why")
    names = set.intersection(*(set(one.samples) for one in done))
    if wanted is not None and wanted.name not in names:
        raise ConfigError(
            f"quality={wanted.short_name}: the proof has no samples of it; it has {', '.join(sorted(names))}"
        )
    chosen = [wanted.name] if wanted is not None else [name for name in PREFERRED if name in names]
    if not chosen:
        raise ConfigError(
            f"the proof has no metric to decide by; it has samples of {', '.join(sorted(names)) or 'nothing'}"
        )
    return all_metrics()[chosen[0]]
