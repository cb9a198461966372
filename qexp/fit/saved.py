"""The recommended model as files: saved by a run of its own, and held against the budget as it was saved."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qexp.checkpoints.checkpoint import Checkpoint, open_checkpoint
from qexp.errors import ConfigError
from qexp.fit.opened import OpenedModel, find_save_folder
from qexp.fit.plan import FitPlan
from qexp.fit.proof import Proven, run_proof
from qexp.fit.request import Request


@dataclass(frozen=True)
class SavedModel:
    """weights_bytes: of all weights in the files of `folder`; excess: bytes over weights= or bits=, 0 if none."""

    folder: Path
    weights_bytes: int
    excess: int


def save_recommended(
    opened: OpenedModel, request: Request, plan: FitPlan, best: Proven, variant: Sequence[str], sweep: str
) -> SavedModel:
    """Save the recommended model by a run of its own. Raises: ConfigError if it cannot be saved."""
    folder = find_save_folder(opened, request)
    assert folder is not None
    contestant = replace(best.contestant, overrides=(*best.contestant.overrides, *request.saving))
    (done,) = run_proof(opened, [contestant], [variant], f"{sweep}_saved")
    if done.problem:
        raise ConfigError(f"the recommended model was not saved: {done.problem}")
    files = {
        name: open_checkpoint(folder / name if opened.source.is_pipeline else folder)
        for name in opened.config.components
    }
    nbytes = sum(file.nbytes for file in files.values())
    if request.bits is None:
        return SavedModel(folder, nbytes, max(nbytes - (request.weights or nbytes), 0))
    layers = 0
    for name, file in files.items():
        chosen = {layer for group in plan.groups for layer in group[0].layers if group[0].component == name}
        layers += bytes_of_layers(file, chosen)
    return SavedModel(folder, nbytes, max(layers - plan.size.bytes_at(request.bits), 0))


def with_less(request: Request, nbytes: int, plan: FitPlan) -> Request:
    """Return the request with weights= or bits= lowered by so many bytes."""
    if request.bits is not None:
        return replace(request, bits=request.bits - plan.size.bits(nbytes))
    assert request.weights is not None
    return replace(request, weights=request.weights - nbytes)


def bytes_of_layers(file: Checkpoint, layers: Collection[str]) -> int:
    """Return the bytes of weights of layers in a file that names them as the network does, biases not counted."""
    return sum(
        entry.nbytes
        for entry in file.entries.values()
        if (module := _module_of(entry.name, layers)) is not None and entry.name != f"{module}.bias"
    )


def _module_of(name: str, layers: Collection[str]) -> str | None:
    """Return the layer that a tensor belongs to: 'block.to_q', of 'block.to_q.weight.absmax'."""
    parents = (name.rsplit(".", count)[0] for count in range(1, name.count(".") + 1))
    return next((parent for parent in parents if parent in layers), None)
