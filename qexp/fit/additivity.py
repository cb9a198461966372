"""Do scores add up? Random mixes are run, and their error is compared with the sum of their scores.

The error is measured in the unit of the scores, on samples of the proof: the squared error of the final latents, its
geometric mean over the samples, or the mean KL divergence of the next token.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from qexp.errors import ConfigError, LoadError
from qexp.fit.mix import Mix
from qexp.fit.program import Groups, undominated
from qexp.fit.proof import Proven
from qexp.results.run_folder import RunFolder

if TYPE_CHECKING:
    from torch import Tensor

MIXES = 8
LEAST_MIXES = 3  # of which a correlation says anything
LEAST = 0.9  # Spearman's correlation below which scores are said not to add up


@dataclass(frozen=True)
class Additivity:
    """spearman: rank correlation of measured with predicted errors; ratio: the median of measured over predicted."""

    predicted: tuple[float, ...]
    measured: tuple[float, ...]

    @property
    def spearman(self) -> float:
        from scipy.stats import spearmanr

        return float(spearmanr(self.predicted, self.measured).statistic)

    @property
    def ratio(self) -> float:
        pairs = zip(self.predicted, self.measured, strict=True)
        return median([found / expected for expected, found in pairs if expected] or [math.nan])

    @property
    def holds(self) -> bool:
        return self.spearman >= LEAST  # False for nan, where all are equal

    def to_container(self) -> dict[str, Any]:
        return {
            "spearman": self.spearman if math.isfinite(self.spearman) else None,
            "measured_over_predicted": self.ratio if math.isfinite(self.ratio) else None,
            "predicted": list(self.predicted),
            "measured": list(self.measured),
        }

    def __str__(self) -> str:
        verdict = "" if self.holds else f", below {LEAST}: scores do not add up here, and predictions mislead"
        return (
            f"scores add up: Spearman {self.spearman:.3f} over {len(self.predicted)} random mixes, measured/predicted "
            f"{self.ratio:.2f}{verdict}"
        )


def random_mixes(groups: Groups, count: int = MIXES, seed: int = 0) -> list[Mix]:
    """Draw mixes of different quality: each leaves out another number of the smallest formats."""
    generator = random.Random(seed)
    mixes = []
    for number in range(count):
        choices = []
        for group in groups:
            own = undominated(group)
            own = own[:-1] or own  # without the dense one
            start = round(number / max(count - 1, 1) * 0.6 * (len(own) - 1))
            choices.append(generator.choice(own[start:]))
        mixes.append(Mix(tuple(choices)))
    return mixes


def measure_additivity(proven: Sequence[Proven], error: str) -> Additivity:
    """Compare the results of random mixes with their scores. error: of the table, "squared_error" or "kl"."""
    done = [one for one in proven if not one.problem]
    if len(done) < LEAST_MIXES:
        problem = next((one.problem for one in proven if one.problem), "")
        raise ConfigError(
            f"{len(done)} of {len(proven)} random mixes ran, and whether scores add up needs {LEAST_MIXES}; "
            f"the first that failed: {problem}"
        )
    measured = [_latent_error(one.folders) if error == "squared_error" else _divergence(one) for one in done]
    return Additivity(tuple(one.contestant.mix.score for one in done), tuple(measured))


def _last(trajectory: Any) -> Tensor:
    """Return the last state of a stored trajectory [steps, samples, ...], in fp64."""
    steps = trajectory.get_shape()[0]
    state: Tensor = trajectory[steps - 1 : steps][0].double()
    return state


def _divergence(one: Proven) -> float:
    values = one.samples["quality/kl_divergence"].values()
    return math.fsum(value * weight for value, weight in values) / math.fsum(weight for _, weight in values)


def _latent_error(folders: Sequence[Path]) -> float:
    """Return the squared error of the last states against the reference's: its geometric mean over samples."""
    from safetensors import safe_open

    errors: list[float] = []
    for folder in folders:
        result = RunFolder(folder).read_result() or {}
        states = []
        for place in (folder, folder.parents[1] / "references" / str(result.get("reference"))):
            try:
                with safe_open(place / "outputs.safetensors", "pt") as file:
                    states.append(_last(file.get_slice("trajectory")))
            except OSError as error:
                raise LoadError(
                    f"{place}: its outputs cannot be read ({error}); run it again with resume=none"
                ) from None
        errors += (states[0] - states[1]).square().flatten(1).mean(1).tolist()
    return math.exp(math.fsum(math.log(max(error, sys.float_info.min)) for error in errors) / len(errors))
