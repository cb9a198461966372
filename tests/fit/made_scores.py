"""Scores that are made up: a model's real layers and bytes, and errors that fall with the bits by a known law."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from qexp.config.backend_options import backend_of
from qexp.config.recipe import format_name
from qexp.fit.layers import ModelLayers, plan_layers
from qexp.fit.opened import open_model
from qexp.fit.request import read_request
from qexp.sensitivity.table import Candidate, Header, SensitivityTable, write_table

OPTIONS = ("packed_uint2", "packed_uint3", "gguf_q4_0", "gguf_q5_0", "gguf")


def write_scores(
    folder: Path,
    words: Sequence[str],
    options: Sequence[str] = OPTIONS,
    change: Callable[[SensitivityTable], SensitivityTable] = lambda table: table,
) -> ModelLayers:
    """Write the table of a model into a folder: score = weight of the layer × 4^-bits × its numbers.

    change: to the table, before it is written.
    """
    formats = {format_name(config): config for config in map(backend_of, options)}
    with open_model(read_request([*words, "bits=4"])) as opened:
        layers = plan_layers(opened.source, opened.config, opened.chosen, formats, hashed=not opened.is_published)
        model, chosen = opened.config.model.source, opened.chosen
    generator, candidates = random.Random(0), list[Candidate]()
    for group in layers.unscored():
        numel = layers.components[group[0].component].numel_of(group[0].layers)
        weight = 10 ** generator.uniform(-3, 1) * numel / 1e6
        candidates += [
            replace(one, score=0.0 if one.format == "none" else weight * 4.0 ** (-8 * one.nbytes / numel))
            for one in group
        ]
    checkpoints = dict(layers.checkpoints) or dict.fromkeys(chosen, "0" * 64)
    header = Header(
        checkpoints, model, "exact", "squared_error", "made up", 16, dict.fromkeys(chosen, 0), tuple(formats), {}
    )
    write_table(folder, change(SensitivityTable(header, tuple(candidates))))
    return layers
