"""Bootstrap intervals against scipy's on the same samples; comparisons of settings against planted truth."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from qexp.errors import ConfigError
from qexp.results.uncertainty import RESAMPLES, SEED, _student_quantile, compare_paired, mean_interval

Draw = Callable[[np.random.Generator, int], NDArray[np.float64]]
DRAWS: dict[str, Draw] = {
    "normal": lambda rng, n: rng.normal(30.0, 4.0, n),
    "skewed": lambda rng, n: rng.lognormal(0.0, 1.0, n),
    "binary": lambda rng, n: np.append(rng.integers(0, 2, n - 2), [0, 1]).astype(float),
    "far from zero": lambda rng, n: rng.normal(1e6, 1e-3, n),
}


def named(values: Sequence[float] | NDArray[np.float64]) -> dict[str, float]:
    return {f"image {number}": float(value) for number, value in enumerate(values)}


@pytest.mark.parametrize("n", [5, 40, 600])  # 600: more than are kept, drawn again in blocks
@pytest.mark.parametrize("kind", DRAWS)
def test_interval_is_the_one_of_scipy(kind: str, n: int) -> None:
    from scipy.stats import bootstrap

    values = DRAWS[kind](np.random.default_rng(n), n)
    expected = bootstrap((values,), np.mean, n_resamples=RESAMPLES, batch=1000, rng=np.random.default_rng(SEED))
    found = mean_interval(values.tolist())
    assert found is not None
    width = expected.confidence_interval.high - expected.confidence_interval.low
    assert found == pytest.approx(tuple(expected.confidence_interval), abs=0.02 * width, rel=1e-15)


def test_interval_of_other_resamples_is_close_to_it() -> None:
    from scipy.stats import bootstrap

    values = DRAWS["skewed"](np.random.default_rng(7), 60)
    expected = bootstrap((values,), np.mean, n_resamples=40_000, rng=np.random.default_rng(99)).confidence_interval
    assert mean_interval(values.tolist()) == pytest.approx(tuple(expected), abs=0.06 * (expected.high - expected.low))


def test_weighted_interval_is_that_of_a_ratio() -> None:
    """Windows of unequal length: the mean over tokens is a ratio of two means over windows."""
    from scipy.stats import bootstrap

    rng = np.random.default_rng(3)
    weights = rng.integers(1, 60, 50).astype(float)
    values = rng.gamma(2.0, 1.0, 50)

    def ratio(x: NDArray[np.float64], w: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
        return (x * w).sum(axis) / w.sum(axis)

    options = {"n_resamples": RESAMPLES, "paired": True, "rng": np.random.default_rng(SEED)}
    expected = bootstrap((values, weights), ratio, **options).confidence_interval
    found = mean_interval(values.tolist(), weights.tolist())
    assert found == pytest.approx(tuple(expected), abs=0.02 * (expected.high - expected.low))
    assert found != pytest.approx(mean_interval(values.tolist()), rel=1e-3)


def test_interval_covers_the_truth() -> None:
    """95 % is meant: of 300 samples of 30, some 95 % of the intervals hold the mean (BCa: a little less)."""
    rng = np.random.default_rng(0)
    intervals = [mean_interval(rng.normal(5.0, 1.0, 30).tolist()) for _ in range(300)]
    held = sum(found is not None and found[0] <= 5.0 <= found[1] for found in intervals)
    assert 270 <= held <= 297


@pytest.mark.parametrize("values", [[], [3.0], [2.0, 2.0, 2.0], [0.1 + 0.2, 0.3], [1.0, math.nan], [1.0, math.inf]])
def test_samples_that_say_nothing_have_no_interval(values: list[float]) -> None:
    assert mean_interval(values) is None


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, -1.0], [1.0, math.nan]])
def test_weights_that_are_none_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights must be positive, one for each of 2 values"):
        mean_interval([1.0, 2.0], weights)


@pytest.mark.parametrize("n", [2, 3, 10, 100])
def test_planted_tie_is_undecided_as_often_as_said(n: int) -> None:
    """Both settings draw from one distribution: at most some 5 % are decided by chance, also with few samples."""
    rng = np.random.default_rng(n)
    ties = [compare_paired(named(rng.normal(size=n)), named(rng.normal(size=n)), "higher") for _ in range(200)]
    assert sum(tie.verdict != "undecided" for tie in ties) <= 18


@pytest.mark.parametrize(("better", "verdict"), [("higher", "better"), ("lower", "worse")])
def test_planted_difference_is_found_in_its_direction(better: str, verdict: str) -> None:
    rng = np.random.default_rng(1)
    theirs = rng.normal(30.0, 4.0, 40)
    ours = theirs + rng.normal(0.5, 0.5, 40)
    found = compare_paired(named(ours), named(theirs), better)
    assert found.verdict == verdict and found.pairs == 40
    assert found.difference == pytest.approx((ours - theirs).mean())
    assert found.interval is not None and 0 < found.interval[0] < 0.5 < found.interval[1] < 0.8
    swapped = compare_paired(named(theirs), named(ours), better)
    assert {swapped.verdict, verdict} == {"better", "worse"}
    assert swapped.difference == pytest.approx(-(ours - theirs).mean())


def test_paired_comparison_finds_what_an_unpaired_one_does_not() -> None:
    """Prompts differ by 4 dB, settings by 0.3 dB: two intervals overlap, the differences are all but constant."""
    from scipy.stats import bootstrap

    rng = np.random.default_rng(2)
    theirs = rng.normal(30.0, 4.0, 50)
    ours = theirs + rng.normal(0.3, 0.2, 50)

    def difference(x: NDArray[np.float64], y: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
        return x.mean(axis) - y.mean(axis)

    unpaired = bootstrap((ours, theirs), difference, n_resamples=2000, rng=np.random.default_rng(SEED))
    assert unpaired.confidence_interval.low < 0 < unpaired.confidence_interval.high
    assert compare_paired(named(ours), named(theirs), "higher").verdict == "better"


def test_samples_are_paired_by_their_names() -> None:
    theirs = named([10.0, 20.0, 30.0, 40.0, 50.0])
    ours = {name: theirs[name] + 1 for name in reversed(theirs)}
    found = compare_paired(ours, theirs, "higher")
    assert (found.verdict, found.difference) == ("better", 1.0)


@pytest.mark.parametrize("values", [[], [5.0]])
def test_one_sample_decides_nothing(values: list[float]) -> None:
    found = compare_paired(named(values), named([value - 1 for value in values]), "higher")
    assert (found.verdict, found.interval, found.pairs) == ("undecided", None, len(values))


def test_equal_samples_are_undecided() -> None:
    values = named(np.random.default_rng(0).normal(size=20))
    found = compare_paired(values, dict(values), "lower")
    assert (found.verdict, found.difference, found.interval) == ("undecided", 0.0, None)


INF = math.inf


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        ([INF] * 5, [40.0] * 5, "better"),  # identical to the reference, against what is not
        ([INF] * 5, [INF] * 5, "undecided"),
        ([40.0] * 5, [INF, INF, INF, INF, 40.0], "worse"),
        ([INF, 30, 31, 29, 30, 30, 31, 29, 31, 29], [30, 31, 29, 30, 31, 29, 31, 29, 30, 30], "undecided"),  # only one
        ([INF, 31, 32, 33.1, 34], [30, 30, 31, 32, 33], "better"),  # and the other pairs say it too
        ([INF, INF, INF, INF, 30, 31, 30], [40, 40, 40, 40, 40, 41, 40], "undecided"),  # these say the opposite
        ([INF, 30.0, 30, 30], [30.0, INF, 30, 30], "undecided"),
        ([math.nan, 5, 5, 5], [1.0, 1, 1, 1], "undecided"),
        ([5.0, 5, 5, 5], [1.0, math.nan, 1, 1], "undecided"),
    ],
)
def test_values_that_are_not_finite(ours: list[float], theirs: list[float], verdict: str) -> None:
    found = compare_paired(named(ours), named(theirs), "higher")
    assert found.verdict == verdict
    assert found.difference is None or found.difference == 0


def test_weights_count_in_a_comparison() -> None:
    """A long window is worse by 1, short ones are better by 1: the tokens decide."""
    ours, theirs = named([1.0, -1.0, -1.1, -1.0]), named([0.0] * 4)
    weights = dict(zip(ours, [1000.0, 1.0, 1.0, 1.0], strict=True))
    found = compare_paired(ours, theirs, "lower", weights)
    assert found.difference == pytest.approx(996.9 / 1003)
    assert found.verdict == "undecided"  # all but one sample
    assert compare_paired(ours, theirs, "lower").difference == pytest.approx(-2.1 / 4)


def test_other_samples_are_an_error_that_names_them() -> None:
    with pytest.raises(ConfigError, match=r"2 samples are in one of the two alone \('image 2', 'x'\)"):
        compare_paired(named([1.0, 2.0, 3.0]), named([1.0, 2.0]) | {"x": 1.0}, "higher")


def test_metric_without_direction_is_an_error() -> None:
    with pytest.raises(ConfigError, match="better=''"):
        compare_paired(named([1.0]), named([2.0]), "")


@pytest.mark.parametrize("degrees", [1, 2, 4, 5, 9, 40, 500])
def test_students_quantile_is_that_of_scipy(degrees: int) -> None:
    from scipy.stats import t

    assert _student_quantile(degrees) == pytest.approx(t.ppf(0.975, degrees), rel=0.01)
