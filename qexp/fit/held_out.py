"""Samples for the proof that no score was made with: other seeds, or the rest of a text."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from qexp.errors import ConfigError
from qexp.fit.opened import OpenedModel
from qexp.fit.recipes import hydra_override
from qexp.models.base import TextSource
from qexp.sensitivity.samples import WINDOW
from qexp.sensitivity.table import SensitivityTable
from qexp.system.files import read_yaml, write_text

LEAST = 256  # tokens of a text that is left


def proof_variants(
    opened: OpenedModel, table: SensitivityTable, place: Path, folder: Path, seeds: int
) -> list[list[str]]:
    """Return the overrides of each run of a contestant: a seed for each, or one with the rest of the text.

    Raises: ConfigError for another task, or a text that is too short.
    """
    check_provable(opened)
    config = opened.config
    if config.task.name == "perplexity":
        path = folder / "held_out.txt"
        write_text(path, _rest_of_text(opened, table, place))
        return [[hydra_override("task.text", str(path))]]
    scored = int((read_yaml(place / "config.yaml") or {}).get("seed") or 0)  # scores may be of another run
    first = max(config.seed, scored) + 1
    return [[f"seed={seed}"] for seed in range(first, first + seeds)]


def check_provable(opened: OpenedModel) -> None:
    """Raise ConfigError for a task whose samples cannot be told from those of the scores."""
    task = opened.config.task.name
    if task == "perplexity" or (task == "generate" and opened.source.modality == "images"):
        return
    remedy = "task=perplexity" if isinstance(opened.source, TextSource) else "task=generate, or --plan"
    raise ConfigError(
        f"task={task}: a proof needs samples that no score was made with: other seeds of images, or the "
        f"rest of a text; use {remedy}"
    )


def _rest_of_text(opened: OpenedModel, table: SensitivityTable, place: Path) -> str:
    """Return the text behind the windows that were scored, from the beginning of a line on."""
    source = cast("TextSource", opened.source)
    lines = source.text(opened.config.task.text).splitlines(keepends=True)
    left = table.header.samples * _window(place)
    for number, line in enumerate(lines):
        left -= len(source.encode(line))
        if left <= 0:
            rest = "".join(lines[number + 1 :])
            if len(source.encode(rest)) >= LEAST:
                return rest
            break
    raise ConfigError(
        f"task.text: fewer than {LEAST} tokens are left behind the {table.header.samples} windows that scores were "
        "made with; give a longer text, or scores of fewer samples (task=sensitivity task.samples=…)"
    )


def _window(place: Path) -> int:
    """Return tokens of a window of the sensitivity run in a folder."""
    stored = read_yaml(place / "config.yaml") or {}
    return int((stored.get("task") or {}).get("window") or WINDOW)
