"""The groups that the program chooses for: candidates with scores from a table, checked against the plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from qexp.config.recipe import format_name
from qexp.errors import ConfigError, choices, first_names
from qexp.fit.layers import ModelLayers
from qexp.fit.recipes import config_of
from qexp.quantizers.configs import BackendConfig
from qexp.sensitivity.table import DENSE, Candidate, SensitivityTable

AGAIN = "run task=sensitivity again with these settings, or leave scores= out"


def formats_in(
    table: SensitivityTable, wanted: Mapping[str, BackendConfig] | None, place: Path
) -> dict[str, BackendConfig]:
    """Name -> config of the formats that have scores; of those that are wanted, if any are named.

    Raises: ConfigError for a backend that does not exist or has no such field, or a wanted format without scores.
    """
    found: dict[str, BackendConfig] = {}
    for candidate in table.candidates:
        if candidate.format not in found and candidate.format != DENSE:
            where = f"'{place}': {candidate.format} of '{candidate.group}'"
            config = config_of(candidate.backend, where)
            if format_name(config) != candidate.format:
                raise ConfigError(f"{where} has a backend that is {format_name(config)}; {AGAIN}")
            found[candidate.format] = config
    if wanted is None:
        return found
    if lacking := [name for name in wanted if name not in found]:
        raise ConfigError(
            f"formats=: '{place}' has no scores of {choices(lacking)}; it has {choices(found)}. Name some of these, or "
            "leave scores= out"
        )
    return {name: config for name, config in found.items() if name in wanted}


def scored_groups(table: SensitivityTable, model: ModelLayers, place: Path) -> list[list[Candidate]]:
    """Return the groups of a table, each with the candidates that the plan has for it, dense first, and their scores.

    Raises: ConfigError where the table is about other layers, or counts other bytes, than the plan.
    """
    groups = []
    for (component, _), scored in table.groups().items():
        own = model.components.get(component)
        if own is None:
            raise ConfigError(
                f"'{place}' scores the component '{component}', and formats are chosen for "
                f"{choices(model.components)}; {AGAIN}"
            )
        layers = scored[0].layers
        if unknown := [layer for layer in layers if layer not in own.weight_of]:
            raise ConfigError(
                f"'{place}' scores {first_names(unknown)} of '{component}', which no format is chosen for here: it is "
                f"no linear layer of this model, or skip_modules leaves it out; {AGAIN}"
            )
        if cut := [name for name in own.groups() if 0 < len({*name} & {*layers}) < len(name)]:
            raise ConfigError(f"'{place}': {first_names(cut[0])} share a weight, and are in two groups; {AGAIN}")
        groups.append(_with_scores(scored, model.candidates(component, layers, own.formats), place))
    return groups


def _with_scores(scored: Sequence[Candidate], planned: Sequence[Candidate], place: Path) -> list[Candidate]:
    by_format = {candidate.format: candidate for candidate in scored}
    found = []
    for candidate in planned:
        known = by_format.get(candidate.format)
        if known is None:
            continue
        if known.format != DENSE and known.nbytes != candidate.nbytes:
            raise ConfigError(
                f"'{place}': {known.format} of '{known.group}' takes {known.nbytes} bytes there, and "
                f"{candidate.nbytes} by the plan of this model; {AGAIN}"
            )
        found.append(replace(candidate, score=known.score))
    return found
