"""Where scores come from: a finished sensitivity run of this model, or a new one."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from qexp.config.hydra_schema import compose_settings
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
from qexp.tasks.sensitivity import SensitivityConfig

SENSITIVITY = "task=sensitivity"
Fields = Mapping[str, Any]  # of a backend's config


def find_scores(opened: OpenedModel, model: ModelLayers, wanted: Mapping[str, BackendConfig] | None) -> Path | None:
    """Return the folder of the latest finished sensitivity run of this model with the wanted formats."""
    folders = sorted(
        (path.parent for path in Path(opened.config.paths.outputs).glob(f"runs/*/{CSV}")),
        key=lambda folder: -(folder / CSV).stat().st_mtime,
    )
    for folder in folders:
        with suppress(QexpError):  # of another model, or damaged: it is not the one
            table = read_table(folder)
            if table.header.checkpoint.keys() == model.checkpoints.keys() and not table.header.base:
                check_checkpoint(table, folder, model.checkpoints)
                formats_in(table, wanted, folder)
                scored_groups(table, model, folder)
                return folder
    return None


def make_scores(opened: OpenedModel, request: Request, backends: Mapping[str, Fields] | None = None) -> Path:
    """Run task=sensitivity with the experiment's own settings; returns its folder.

    backends: format -> fields of its backend; exact scores of these are made with all other layers in the last one.
    Raises: ConfigError if it fails; its reason has been printed.
    """
    own = {item.name for item in fields(SensitivityConfig)} - {"name", "window"}
    kept = [word for word in opened.overrides if not word.startswith("task=") and _is_kept(word, own)]
    asked = {"score": request.score, "groups": request.groups, "formats": request.formats_text}
    if backends is not None:
        written = list(map(_as_override, backends.values()))
        asked |= {"score": "exact", "formats": f"[{', '.join(written)}]", "base": written[-1]}
    words = [SENSITIVITY, *kept, *(f"task.{name}={value}" for name, value in asked.items() if value is not None)]
    config = to_run_config(compose_settings(words))
    if run_job(config, words).status != "done":
        raise ConfigError("there are no scores: task=sensitivity ended as the line above says")
    return Path(config.paths.outputs, "runs", run_key(config))


def _as_override(fields_of_backend: Fields) -> str:
    """Return a backend's fields as Hydra reads them: `{quant_method: "gguf", quant_type: "Q4_0"}`."""
    return f"{{{', '.join(f'{name}: {json.dumps(value)}' for name, value in fields_of_backend.items())}}}"


def _is_kept(word: str, own: Collection[str]) -> bool:
    """Return whether an override of the experiment is one of a sensitivity run, too."""
    name = word.lstrip("+").partition("=")[0]
    return not name.startswith("task.") or name.removeprefix("task.").partition(".")[0] in own
