"""Where scores come from: a finished sensitivity run of this model, or a new one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

from qexp.config.hydra_schema import compose_settings
from qexp.config.recipe import format_name
from qexp.errors import ConfigError, QexpError
from qexp.experiments.resolve import to_run_config
from qexp.fit.candidates import formats_in, scored_groups
from qexp.fit.layers import ModelLayers
from qexp.fit.opened import OpenedModel
from qexp.fit.request import Request
from qexp.quantizers.configs import BackendConfig
from qexp.sensitivity.table import CSV, check_checkpoint, read_table
from qexp.sweep.job import run_job
from qexp.sweep.run_key import run_key
from qexp.tasks.sensitivity import DEFAULT_FORMATS, SensitivityConfig, read_formats

SENSITIVITY = "task=sensitivity"


def default_formats() -> dict[str, BackendConfig]:
    """Return the candidate formats of task=sensitivity where task.formats is not given."""
    return {format_name(config): config for config in read_formats(DEFAULT_FORMATS)}


def find_scores(opened: OpenedModel, model: ModelLayers, wanted: Mapping[str, BackendConfig] | None) -> Path | None:
    """Return the folder of the latest finished sensitivity run of this model with the wanted formats."""
    folders = sorted(
        (path.parent for path in Path(opened.config.paths.outputs).glob(f"runs/*/{CSV}")),
        key=lambda folder: -(folder / CSV).stat().st_mtime,
    )
    for folder in folders:
        with suppress(QexpError):  # of another model, or damaged: it is not the one
            table = read_table(folder)
            if table.header.checkpoint.keys() == model.checkpoints.keys():
                check_checkpoint(table, folder, model.checkpoints)
                formats_in(table, wanted, folder)
                scored_groups(table, model, folder)
                return folder
    return None


def make_scores(opened: OpenedModel, request: Request, score: str | None = None) -> Path:
    """Run task=sensitivity with the experiment's own settings; returns its folder.

    score: of the run, in place of what was asked for. Raises: ConfigError if it fails; its reason has been printed.
    """
    own = {item.name for item in fields(SensitivityConfig)} - {"name", "window"}
    kept = [word for word in opened.overrides if not word.startswith("task=") and _is_kept(word, own)]
    asked = {"score": score or request.score, "groups": request.groups, "formats": request.formats_text}
    words = [SENSITIVITY, *kept, *(f"task.{name}={value}" for name, value in asked.items() if value is not None)]
    config = to_run_config(compose_settings(words))
    if run_job(config, words).status != "done":
        raise ConfigError("there are no scores: task=sensitivity ended as the line above says")
    return Path(config.paths.outputs, "runs", run_key(config))


def _is_kept(word: str, own: Collection[str]) -> bool:
    """Return whether an override of the experiment is one of a sensitivity run, too."""
    name = word.lstrip("+").partition("=")[0]
    return not name.startswith("task.") or name.removeprefix("task.").partition(".")[0] in own
