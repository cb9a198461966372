"""The integer program against brute force over all assignments."""

import itertools
import random
import time

import pytest

from qexp.fit.mix import Mix, key_of, uniform_mix
from qexp.fit.program import Groups, Limits, best_mix, smallest_bytes
from qexp.sensitivity.table import Candidate
from tests.products import representatives

FORMATS = ("none", "two", "four", "eight")
BITS = {"none": 16, "two": 2, "four": 4, "eight": 8}


def made_groups(count: int, seed: int, spread: float = 3) -> list[list[Candidate]]:
    """Layers of some thousand weights whose errors differ by orders of magnitude, and fall with the bits unevenly."""
    rng = random.Random(seed)
    groups = []
    for number in range(count):
        numel, weight = rng.randrange(1000, 9000), 10 ** rng.uniform(-spread, spread)
        scores = {
            name: 0.0 if name == "none" else weight * 4.0**-bits * rng.uniform(0.5, 2) for name, bits in BITS.items()
        }
        layer = f"blocks.{number}"
        groups.append(
            [
                Candidate("model", layer, (layer,), name, {"quant_method": name}, numel * BITS[name] // 8, scores[name])
                for name in FORMATS
            ]
        )
    return groups


def brute_force(groups: Groups, limits: Limits) -> float | None:
    """The lowest score of all assignments of formats and places that keep the limits."""
    places = (False, True) if limits.travel_bytes is not None else (False,)
    best = None
    for choices in itertools.product(*groups):
        for away in itertools.product(places, repeat=len(groups)):
            rest = sum(c.nbytes for c, is_away in zip(choices, away, strict=True) if not is_away)
            extra = [limits.extra.get(key_of(c), 0) for c in choices]
            rest -= sum(e for e, is_away in zip(extra, away, strict=True) if is_away)
            gone = [c.nbytes + e for c, e, is_away in zip(choices, extra, away, strict=True) if is_away]
            if rest + limits.slots * max(gone, default=0) > limits.device_bytes or sum(gone) > (
                limits.travel_bytes or 0
            ):
                continue
            score = sum(choice.score for choice in choices)
            best = score if best is None else min(best, score)
    return best


@pytest.mark.parametrize("seed", representatives(range(6), range(3)))
def test_six_layers_at_many_budgets_are_as_brute_force(seed: int) -> None:
    groups = made_groups(6, seed)
    least = smallest_bytes(groups)
    for factor in (1.0, 1.1, 1.5, 2.2, 3.1, 4.7, 7.9, 8.0):
        limits = Limits(int(least * factor))
        mix = best_mix(groups, limits)
        assert mix is not None and mix.nbytes <= limits.device_bytes
        assert mix.score == pytest.approx(brute_force(groups, limits), rel=1e-9, abs=0)


@pytest.mark.parametrize("seed", range(3))
def test_formats_and_places_are_as_brute_force(seed: int) -> None:
    groups = made_groups(4, seed, spread=1)
    extra = {("model", group[0].group): 64 for group in groups}
    least, dense = smallest_bytes(groups), uniform_mix(groups, "none").nbytes
    for device, travel in ((0.8, 0.6), (1.5, 0.2), (3.0, 0.5), (3.0, 0.0), (0.2, 0.1)):
        limits = Limits(int(least * device), int(dense * travel), 2, extra)
        mix, expected = best_mix(groups, limits), brute_force(groups, limits)
        assert (mix is None) == (expected is None)
        if mix is not None and expected is not None:
            assert max(limits.excess(mix)) <= 0
            assert mix.score == pytest.approx(expected, rel=2e-3)  # the gap at which the solver stops


def test_budget_below_the_smallest_formats_has_no_mix() -> None:
    groups = made_groups(5, 0)
    assert best_mix(groups, Limits(smallest_bytes(groups) - 1)) is None
    assert best_mix(groups, Limits(smallest_bytes(groups))) is not None


def test_budget_for_everything_leaves_every_layer_dense() -> None:
    groups = made_groups(5, 0)
    mix = best_mix(groups, Limits(uniform_mix(groups, "none").nbytes))
    assert mix is not None and mix.formats == {"none": 5} and mix.score == 0


def test_layers_away_are_counted_in_slots_and_in_travel() -> None:
    groups = [[Candidate("m", name, (name,), "none", {}, nbytes, 0.0)] for name, nbytes in (("a", 100), ("b", 60))]
    mix = Mix(tuple(group[0] for group in groups), frozenset({("m", "b")}))
    limits = Limits(230, 70, 2, {("m", "b"): 5})
    # a rests: 100; b leaves with its 5 bytes of bias, which are counted elsewhere; two slots of 65
    assert limits.device_bytes_of(mix) == 100 - 5 + 2 * 65
    assert limits.excess(mix) == (225 - 230, 65 - 70)


def test_hundreds_of_layers_take_milliseconds() -> None:
    groups = made_groups(700, 1)
    started = time.process_time()
    for factor in (1.5, 2.5, 5.0):
        limits = Limits(int(smallest_bytes(groups) * factor))
        mix = best_mix(groups, limits)
        assert mix is not None and limits.device_bytes * 0.999 < mix.nbytes <= limits.device_bytes
    assert time.process_time() - started < 10  # some 0.2 s each; with every candidate open minutes
