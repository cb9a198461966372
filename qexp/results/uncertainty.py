"""The uncertainty of a mean over samples, and whether two settings differ on the same samples: the bootstrap.

Intervals are 95 %, bias-corrected and accelerated (BCa), from 9,999 resamples with a fixed seed: what
`scipy.stats.bootstrap` computes by default. Resamples are drawn once for each number of samples, as how often each
sample occurs, so that the means of all of them are one product of a matrix with a vector.

Two settings are compared by the mean of the differences, sample by sample: what is hard for both (a prompt) drops out.
The setting is better or worse if the interval of that mean excludes 0, and so does Student's: of a few samples the
bootstrap alone is too narrow (of two it would decide half of all ties).

Sources: Efron, J. Am. Stat. Assoc. 82 (1987), BCa; Hesterberg, The American Statistician 69 (2015), small samples.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, Literal

from qexp.errors import ConfigError, first_names

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Vector = NDArray[np.float64]

Interval = tuple[float, float]
Verdict = Literal["better", "worse", "undecided"]
VERDICTS: dict[int, Verdict] = {1: "better", -1: "worse", 0: "undecided"}  # by the sign of (ours - theirs)
LEVEL = 0.95
RESAMPLES = 9999
SEED = 0
BLOCK = 1 << 21  # counts in memory at a time: 16 MiB
KEPT_SAMPLES = 512  # resamples of more samples than this are drawn again each time: 40 MiB of counts
ROUNDING = 1e-12  # of the largest value: means closer than this are equal
SMALL_T = (12.7062, 4.3027, 3.1824, 2.7764)  # Student's 97.5 % quantile for 1 to 4 degrees of freedom


@dataclass(frozen=True)
class PairedComparison:
    """Whether one setting is better than another on the same samples.

    difference: the mean of (ours - theirs), None where it is not finite; interval: its 95 %, None where there is none;
    pairs: the number of samples.
    """

    verdict: Verdict
    difference: float | None
    interval: Interval | None
    pairs: int


def mean_interval(values: Sequence[float], weights: Sequence[float] | None = None) -> Interval | None:
    """Return the 95 % bootstrap interval of the mean of independent samples.

    None where samples say nothing about it: fewer than two, all equal, or one that is not finite.

    Args:
        values: one for each sample.
        weights: positive; the mean is sum(w x) / sum(w). For samples that are means themselves, of unequal size.

    Raises: ValueError for weights that are not positive, or not as many as values.
    """
    import numpy as np

    x = np.asarray(values, dtype=np.float64)
    w = np.ones_like(x) if weights is None else np.asarray(weights, dtype=np.float64)
    if w.shape != x.shape or not (np.isfinite(w) & (w > 0)).all():
        raise ValueError(f"weights must be positive, one for each of {len(x)} values")
    if len(x) < 2 or not np.isfinite(x).all() or np.ptp(x) <= ROUNDING * np.abs(x).max():
        return None
    return _bca(x, w)


def compare_paired(
    ours: Mapping[Any, float], theirs: Mapping[Any, float], better: str, weights: Mapping[Any, float] | None = None
) -> PairedComparison:
    """Say whether `ours` is better than `theirs`, by the values of the same samples.

    An infinite value is legal (the PSNR of an image that is identical to its reference): two of them are equal. Against
    finite ones it decides if nearly every resample has such a pair, and the other pairs do not say the opposite.
    Undecided with a value that is not a number, and with one sample.

    Args:
        ours, theirs: sample -> value.
        better: 'higher' or 'lower', as `Metric.better` says.
        weights: sample -> weight, see `mean_interval`.

    Raises: ConfigError for different samples, or a metric without a better direction.
    """
    _check_comparable(ours, theirs, better)
    differences = [0.0 if value == theirs[name] else value - theirs[name] for name, value in ours.items()]
    known = [1.0 if weights is None else weights[name] for name in ours]
    finite = [(value, weight) for value, weight in zip(differences, known, strict=True) if math.isfinite(value)]
    interval = mean_interval([value for value, _ in finite], [weight for _, weight in finite])
    side = _decided_side(finite, interval)
    mean = _weighted_mean(finite) if finite and len(finite) == len(differences) else None
    if len(finite) < len(differences):
        side, interval = _side_with_infinite(side, differences), None
    verdict = VERDICTS[side if better == "higher" else -side]
    return PairedComparison(verdict, mean, interval, len(differences))


def _check_comparable(ours: Mapping[Hashable, float], theirs: Mapping[Hashable, float], better: str) -> None:
    if better not in ("higher", "lower"):
        raise ConfigError(f"better={better!r}: only a metric that is better 'higher' or 'lower' can be compared")
    alone = [str(name) for name in [*ours, *theirs] if name not in ours or name not in theirs]
    if alone:
        raise ConfigError(
            f"{len(alone)} samples are in one of the two alone ({first_names(alone)}); a comparison needs the same "
            "ones in both: the same prompts, seed, number of images or text"
        )


def _weighted_mean(samples: Sequence[tuple[float, float]]) -> float:
    return math.fsum(w * x for x, w in samples) / math.fsum(w for _, w in samples)


def _decided_side(samples: Sequence[tuple[float, float]], interval: Interval | None) -> int:
    """Return the sign of the mean of (value, weight) if it is decided, else 0."""
    if len(samples) < 2:
        return 0
    mean = _weighted_mean(samples)
    if interval is None:  # all differences are the same
        return _sign(mean)
    total = math.fsum(w for _, w in samples)
    effective = total**2 / math.fsum(w * w for _, w in samples)  # number of samples
    variance = math.fsum(w * (x - mean) ** 2 for x, w in samples) / total
    error = math.sqrt(variance / max(effective - 1, ROUNDING))
    is_outside = interval[0] > 0 or interval[1] < 0
    return _sign(mean) if is_outside and abs(mean) > _student_quantile(max(round(effective) - 1, 1)) * error else 0


def _side_with_infinite(finite_side: int, differences: Sequence[float]) -> int:
    """Return the decided side where some differences are infinite: a share of resamples has none of these."""
    infinite = {_sign(value) for value in differences if not math.isfinite(value)}
    if len(infinite) != 1 or 0 in infinite or -finite_side in infinite:  # 0: not a number
        return 0
    share = sum(math.isfinite(value) for value in differences) / len(differences)
    is_rare = len(differences) > 1 and share ** len(differences) < (1 - LEVEL) / 2
    return infinite.pop() if is_rare or finite_side else 0


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def _student_quantile(degrees: int) -> float:
    """Return the 97.5 % quantile of Student's t, within 1 %. Source: Abramowitz and Stegun, 26.7.5."""
    if degrees <= len(SMALL_T):
        return SMALL_T[degrees - 1]
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def _bca(x: Vector, w: Vector) -> Interval:
    """Return the BCa interval of a weighted mean: x and w [n], not all x equal."""
    import numpy as np

    normal = NormalDist()
    total, mean = w.sum(), (w * x).sum() / w.sum()
    centered = x - mean
    means = np.concatenate([counts @ (w * centered) / (counts @ w) for counts in _resamples(len(x))])
    near = ROUNDING * np.abs(x).max()  # permutations of the samples have their mean, but for the last bits
    below = ((means < -near).mean() + (means <= near).mean()) / 2
    bias = normal.inv_cdf(min(max(float(below), 0.5 / RESAMPLES), 1 - 0.5 / RESAMPLES))
    without = -w * centered / (total - w)  # jackknife: the mean without each sample, less the mean
    influence = without.mean() - without
    acceleration = float((influence**3).sum() / (6 * (influence**2).sum() ** 1.5))
    ends = (bias + normal.inv_cdf((1 + sign * LEVEL) / 2) for sign in (-1, 1))
    places = [normal.cdf(bias + end / (1 - acceleration * end)) for end in ends]
    low, high = np.quantile(means, places) + mean
    return float(low), float(high)


def _resamples(n: int) -> Sequence[Vector] | Iterator[Vector]:
    """Return how often each of n samples occurs in each resample: blocks of [some resamples, n], RESAMPLES in all."""
    return _kept_resamples(n) if n <= KEPT_SAMPLES else _draw_resamples(n)


@lru_cache(maxsize=2)
def _kept_resamples(n: int) -> Sequence[Vector]:
    return list(_draw_resamples(n))


def _draw_resamples(n: int) -> Iterator[Vector]:
    import numpy as np

    generator, rows = np.random.default_rng(SEED), max(BLOCK // n, 1)
    for start in range(0, RESAMPLES, rows):
        drawn = generator.integers(0, n, (min(rows, RESAMPLES - start), n))
        places = drawn + n * np.arange(len(drawn))[:, None]
        yield np.bincount(places.ravel(), minlength=drawn.size).reshape(drawn.shape).astype(np.float64)
