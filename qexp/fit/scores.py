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
from qexp.sensitivity.table import CSV, check_checkpoint, read_table
from qexp.sweep.job import run_job
from qexp.sweep.run_key import run_key
from qexp.system.files import read_yaml
from qexp.tasks.sensitivity import SensitivityConfig

SENSITIVITY = "task=sensitivity"
FINAL_WEIGHTS = 100_000_000  # of the scored components, up to which every format of every layer generates the samples
# settings of a sensitivity run that do not change what a score is of: those of the proof's samples among them
COMPARED_APART = ("score", "formats", "base", "projections", "states", "num_images", "batch_size")
Fields = Mapping[str, Any]  # of a backend's config


def score_of(opened: OpenedModel, model: ModelLayers, request: Request) -> str:
    """Return `task.score` of a new run: as asked for; else of samples at the end, where generating them is cheap."""
    if request.score is not None:
        return request.score
    numel = sum(sum(one.numel.values()) for one in model.components.values())
    return "final" if opened.source.modality != "text" and numel <= FINAL_WEIGHTS else "exact"


def find_scores(opened: OpenedModel, model: ModelLayers, request: Request) -> Path | None:
    """Return the folder of a finished sensitivity run that asked the same of this model, for the wanted formats.

    The same layers and groups, sampled the same way, with `score=` if that is given. Of several the latest one of the
    kind that would be made now, else the latest one.
    """
    if opened.is_published:  # there are no weights that scores could be of
        return None
    kind = score_of(opened, model, request)
    asked = _question(to_run_config(compose_settings(sensitivity_words(opened, request, kind))).to_container())
    found: list[tuple[bool, float, Path]] = []
    for path in Path(opened.config.paths.outputs).glob(f"runs/*/{CSV}"):
        folder = path.parent
        with suppress(QexpError):  # of another model, or damaged: it is not the one
            table = read_table(folder)
            if table.header.checkpoint.keys() != model.checkpoints.keys() or table.header.base:
                continue
            check_checkpoint(table, folder, model.checkpoints)
            formats_in(table, request.formats, folder)
            scored_groups(table, model, folder)
            is_asked = _question(read_yaml(folder / "config.yaml") or {}) == asked
            if is_asked and request.score in (None, table.header.score):
                found.append((table.header.score == kind, path.stat().st_mtime, folder))
    return max(found)[-1] if found else None


def _question(config: Mapping[str, Any]) -> Any:
    """Return what scores are of, but for checkpoint, formats and the kind of score: layers, groups, samples."""
    task = {name: value for name, value in config.get("task", {}).items() if name not in COMPARED_APART}
    kept = ("skip_modules", "keep_in_fp32_modules")
    layers = {name: [own.get(item) for item in kept] for name, own in config.get("components", {}).items()}
    return json.loads(json.dumps([task, layers], default=str))


def make_scores(
    opened: OpenedModel, request: Request, score: str, backends: Mapping[str, Fields] | None = None
) -> Path:
    """Run task=sensitivity with the experiment's own settings; returns its folder.

    score: its `task.score`; backends: format -> fields of its backend; scores of these are made with all other layers
    in the last one. Raises: ConfigError if it fails; its reason has been printed.
    """
    words = sensitivity_words(opened, request, score, backends)
    config = to_run_config(compose_settings(words))
    if run_job(config, words).status != "done":
        raise ConfigError("there are no scores: task=sensitivity ended as the line above says")
    return Path(config.paths.outputs, "runs", run_key(config))


def sensitivity_words(
    opened: OpenedModel, request: Request, score: str, backends: Mapping[str, Fields] | None = None
) -> list[str]:
    """Return the overrides of a sensitivity run with the experiment's own settings."""
    own = {item.name for item in fields(SensitivityConfig)} - {"name", "window"}
    kept = [word for word in opened.overrides if not word.startswith("task=") and _is_kept(word, own)]
    asked = {"score": score, "groups": request.groups, "formats": request.formats_text}
    if backends is not None:
        written = list(map(_as_override, backends.values()))
        asked |= {"formats": f"[{', '.join(written)}]", "base": written[-1]}
    return [SENSITIVITY, *kept, *(f"task.{name}={value}" for name, value in asked.items() if value is not None)]


def _as_override(fields_of_backend: Fields) -> str:
    """Return a backend's fields as Hydra reads them: `{quant_method: "gguf", quant_type: "Q4_0"}`."""
    return f"{{{', '.join(f'{name}: {json.dumps(value)}' for name, value in fields_of_backend.items())}}}"


def _is_kept(word: str, own: Collection[str]) -> bool:
    """Return whether an override of the experiment is one of a sensitivity run, too."""
    name = word.lstrip("+").partition("=")[0]
    return not name.startswith("task.") or name.removeprefix("task.").partition(".")[0] in own
