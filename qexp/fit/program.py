"""The integer program: the mix with the lowest predicted error within a budget of bytes.

    minimize    Σ score[g, f] x[g, f, p]                              x = 1: group g has format f and rests at place p
    subject to  Σ x[g, f, p] over f, p          = 1                   for each group
                Σ bytes[g, f] x[g, f, device]   + slots·R <= budget   bytes on the device
                Σ bytes[g, f] x[g, f, away]     <= travel             bytes that are copied in each step
                Σ bytes[g, f] x[g, f, away] over f <= R               R: a slot holds the largest group that travels

Without a bound on time nothing is away, and it is a multiple-choice knapsack. A greedy mix and its price of a byte then
bound what the best one can be, and every candidate with which a mix would be worse than the greedy one is left out
(Lagrangian reduced costs; Pisinger, EJOR 83 (1995)): of hundreds of layers a few choices remain open.

The solver (HiGHS, by `scipy.optimize.milp`) works in floating point with tolerances around 1e-6. So scores are divided
by those of the greedy mix, and the budget is checked in whole bytes: where the solver is over by a few, it solves again
with that much less.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np

from qexp.fit.mix import Key, Mix, key_of
from qexp.sensitivity.table import Candidate

GAP = 1e-6  # of the objective, relative, at which the solver stops
GAP_WITH_PLACES = 1e-3  # where layers may be away, candidates cannot be left out
SECONDS = 4.0  # for one solution; the best one found by then is taken
ROUNDING = 1e-9  # of a score, relative
ATTEMPTS = 5  # solutions that are over the budget by the solver's tolerance

Groups = Sequence[Sequence[Candidate]]


@dataclass(frozen=True)
class Limits:
    """device_bytes: of the groups on the device, and the slots; travel_bytes: copied in a step, None: nothing is away;
    slots: groups that travel which are on the device at a time; extra: see `Mix.travelling`."""

    device_bytes: int
    travel_bytes: int | None = None
    slots: int = 2
    extra: Mapping[Key, int] = field(default_factory=dict)

    def device_bytes_of(self, mix: Mix) -> int:
        """Return the device bytes of a mix: groups that rest there, and slots for those that do not."""
        resting = sum(choice.nbytes for choice in mix.choices if key_of(choice) not in mix.away)
        travelling = mix.travelling(self.extra)
        beside = sum(self.extra.get(key, 0) for key in mix.away)  # counted with what is fixed, and not there
        return resting - beside + self.slots * max(travelling, default=0)

    def excess(self, mix: Mix) -> tuple[int, int]:
        """Return (bytes over the limit of the device, over that of a step); 0 or less where the mix keeps it."""
        travelling = sum(mix.travelling(self.extra))
        return self.device_bytes_of(mix) - self.device_bytes, travelling - (self.travel_bytes or 0)


def best_mix(groups: Groups, limits: Limits) -> Mix | None:
    """Return the mix with the lowest score that keeps the limits; None if there is none."""
    if limits.travel_bytes is None and smallest_bytes(groups) > limits.device_bytes:
        return None
    known, tightened = greedy_mix(groups, limits.device_bytes), limits
    for _ in range(ATTEMPTS):
        found = _solve(groups, tightened, known)
        if found is None:
            return known
        over = limits.excess(found)
        if max(over) <= 0:
            found = _brought_home(found, limits)
            if known is None and limits.travel_bytes is not None:  # once more, with scores on the scale of this one
                known = found
                continue
            return found if known is None or found.score <= known.score else known
        tightened = replace(
            tightened,
            device_bytes=tightened.device_bytes - max(over[0], 0),
            travel_bytes=None if limits.travel_bytes is None else (tightened.travel_bytes or 0) - max(over[1], 0),
        )
    return known


def smallest_bytes(groups: Groups) -> int:
    """Return bytes of the smallest mix there is."""
    return sum(min(candidate.nbytes for candidate in group) for group in groups)


def greedy_mix(groups: Groups, budget: int) -> Mix | None:
    """Return a mix that fits: from the smallest one, the exchange with the most score for a byte first.

    None if none fits.
    """
    hulls = [_lower_hull(group) for group in groups]
    taken, used = [0] * len(hulls), sum(hull[0].nbytes for hull in hulls)
    if used > budget:
        return None
    steps = [
        ((before.score - after.score) / (after.nbytes - before.nbytes), number, place)
        for number, hull in enumerate(hulls)
        for place, (before, after) in enumerate(pairwise(hull), start=1)
    ]
    for _, number, place in sorted(steps, key=lambda step: (-step[0], step[2])):
        more = hulls[number][place].nbytes - hulls[number][taken[number]].nbytes
        if place == taken[number] + 1 and used + more <= budget:
            taken[number], used = place, used + more
    return Mix(tuple(hull[place] for hull, place in zip(hulls, taken, strict=True)))


def open_candidates(groups: Groups, limits: Limits, known: Mix | None) -> list[list[Candidate]]:
    """Return the candidates of each group that a mix no worse than the known one can have."""
    if known is None:
        return [undominated(group) for group in groups]
    most = known.score * (1 + ROUNDING)
    if limits.travel_bytes is not None:
        return [[candidate for candidate in undominated(group) if candidate.score <= most] for group in groups]
    price = _price_of_a_byte(groups, known)
    costs = [{one.format: one.score + price * one.nbytes for one in group} for group in groups]
    least = [min(cost.values()) for cost in costs]
    bound = sum(least) - price * limits.device_bytes  # no mix within the budget is better
    return [
        [one for one in undominated(group) if bound + cost[one.format] - smallest <= most + ROUNDING * abs(bound)]
        for group, cost, smallest in zip(groups, costs, least, strict=True)
    ]


def _price_of_a_byte(groups: Groups, known: Mix) -> float:
    """Return the most that one more byte would bring to a greedy mix: the steepest step that it has not taken."""
    slopes = [0.0]
    for group, taken in zip(groups, known.choices, strict=True):
        hull = _lower_hull(group)
        place = hull.index(taken)
        slopes += [-_slope(taken, hull[place + 1])] if place + 1 < len(hull) else []
    return max(slopes)


def undominated(group: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates to which no other one is both smaller and better, by bytes."""
    kept: list[Candidate] = []
    for candidate in sorted(group, key=lambda candidate: (candidate.nbytes, candidate.score)):
        if not kept or candidate.score < kept[-1].score:
            kept.append(candidate)
    return kept


def _lower_hull(group: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates on the lower convex hull of score over bytes."""
    hull: list[Candidate] = []
    for candidate in undominated(group):
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], candidate):
            hull.pop()
        hull.append(candidate)
    return hull


def _slope(first: Candidate, second: Candidate) -> float:
    return (second.score - first.score) / (second.nbytes - first.nbytes)


def _solve(groups: Groups, limits: Limits, known: Mix | None) -> Mix | None:
    """Return one call of the solver. known: a mix that fits, whose score is the unit; None if there is none yet."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    unit = known.score if known is not None else sum(max(one.score for one in group) for group in groups)
    if unit == 0:
        return known
    places = (False,) if limits.travel_bytes is None else (False, True)
    variables = [
        (number, candidate, is_away)
        for number, group in enumerate(open_candidates(groups, limits, known))
        for candidate in group
        for is_away in places
    ]
    costs = np.array([candidate.score / unit for _, candidate, _ in variables] + [0.0])  # the last one is R
    matrix, low, high = _constraints(variables, len(groups), limits)
    result = milp(
        costs,
        constraints=LinearConstraint(matrix, low, high),
        integrality=np.array([1] * len(variables) + [0]),
        bounds=Bounds(0, np.array([1.0] * len(variables) + [np.inf])),
        options={"mip_rel_gap": GAP if limits.travel_bytes is None else GAP_WITH_PLACES, "time_limit": SECONDS},
    )
    if result.x is None:
        return None
    taken = [variables[place] for place in np.flatnonzero(result.x[:-1] > 0.5)]
    return Mix(
        tuple(candidate for _, candidate, _ in taken),
        frozenset(key_of(candidate) for _, candidate, is_away in taken if is_away),
    )


def _constraints(variables: Sequence[tuple[int, Candidate, bool]], count: int, limits: Limits) -> Any:
    """(matrix, lower, upper bounds) of the rows in the module's text, bytes in units of the budget."""
    from scipy.sparse import coo_array

    unit = max(limits.device_bytes, 1)
    rows, columns, values = [], [], []

    def add(row: int, column: int, value: float) -> None:
        rows.append(row)
        columns.append(column)
        values.append(value)

    device, travel, slot = count, count + 1, count + 2  # rows behind those of the groups
    for column, (number, candidate, is_away) in enumerate(variables):
        extra = limits.extra.get(key_of(candidate), 0)
        add(number, column, 1.0)
        if is_away:
            add(device, column, -extra / unit)
            add(travel, column, (candidate.nbytes + extra) / unit)
            add(slot + number, column, (candidate.nbytes + extra) / unit)
        else:
            add(device, column, candidate.nbytes / unit)
    add(device, len(variables), float(limits.slots))
    for number in range(count):
        add(slot + number, len(variables), -1.0)
    high = [1.0] * count + [limits.device_bytes / unit, (limits.travel_bytes or 0) / unit] + [0.0] * count
    low = [1.0] * count + [-np.inf] * (2 + count)
    return coo_array((values, (rows, columns)), shape=(2 * count + 2, len(variables) + 1)).tocsr(), low, high


def _brought_home(mix: Mix, limits: Limits) -> Mix:
    """Return the mix with what need not be away on the device: the solver has no reason to prefer that."""
    for choice in sorted(mix.choices, key=lambda choice: -choice.nbytes):
        if key_of(choice) in mix.away:
            nearer = replace(mix, away=mix.away - {key_of(choice)})
            mix = nearer if max(limits.excess(nearer)) <= 0 else mix
    return mix
