"""Describe published models without their weights: components, configs and sizes.

`assets/architectures/<name>.json` has a model's repository, its licence, its model_index.json, and for every component
the config.json that lies in its folder there, with the number of parameters (each counted once), the dtype and the
largest file of its weights. That is enough to build the networks on the meta device, to plan a load to the exact byte,
and to write checkpoints of the same layout (scripts/make_checkpoint.py), without downloading anything.

Reading one imports no torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qexp.checkpoints.checkpoint import Checkpoint
from qexp.checkpoints.tensor_entry import DTYPE_BYTES, TensorEntry
from qexp.errors import ConfigError, choices, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor, nn

ASSETS = Path(__file__).parents[1] / "assets" / "architectures"
SAFETENSORS_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class ComponentArchitecture:
    """parameters: each counted once; dtype: of the published weights; max_shard_gb: of a file of them (10^9 bytes);
    config: its config.json."""

    parameters: int
    dtype: str
    max_shard_gb: float
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Architecture:
    """gated: whether a download needs an accepted licence and a token; source: where the values are published."""

    name: str
    repository: str
    source: str
    license: str
    gated: bool
    model_index: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    components: Mapping[str, ComponentArchitecture]


def architecture_names() -> list[str]:
    return sorted(path.stem for path in ASSETS.glob("*.json"))


@cache
def architecture(name: str) -> Architecture:
    """Return a published model by its file's name. Raises ConfigError with the choices for an unknown one."""
    if name not in architecture_names():
        names = architecture_names()
        raise ConfigError(f"architecture {name!r} is unknown{did_you_mean(name, names)}; use {choices(names)}")
    values = json.loads((ASSETS / f"{name}.json").read_text(encoding="utf-8"))
    components = {part: ComponentArchitecture(**found) for part, found in values.pop("components").items()}
    return Architecture(name=name, components=components, **values)


def component_of(name: str, component: str) -> ComponentArchitecture:
    """Return a component of a published model. Raises ConfigError with the choices for an unknown one."""
    components = architecture(name).components
    if component not in components:
        hint = did_you_mean(component, components)
        raise ConfigError(f"{name!r} has no component {component!r}{hint}; use {choices(components)}")
    return components[component]


def network(config: Mapping[str, Any]) -> nn.Module:
    """Build the network of a component's config.json on the meta device."""
    from qexp.models.folder import FolderSource
    from qexp.models.skeletons import on_meta

    with on_meta():
        return FolderSource(ASSETS, None).skeleton("model", dict(config)).eval().requires_grad_(False)


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return name in a published file -> tensor of the network, each tensor once, in the order of the files."""
    places, names = set[Any](), dict[str, str]()
    tensors: dict[str, Tensor] = model.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        place = (tensor.untyped_storage()._cdata, tensor.storage_offset())
        if place not in places:
            names[name] = name
        places.add(place)
    if hasattr(model, "base_model_prefix"):
        from qexp.models.transformers_networks import published_names

        names = published_names(model, names)
    return {published: tensors[name] for name, published in names.items()}


def as_checkpoint(component: ComponentArchitecture, model: nn.Module, path: Path) -> Checkpoint:
    """Return a checkpoint with the published files' headers, for planning: one file in `path` that is never read."""
    dtype, file, offset, entries = SAFETENSORS_NAMES[component.dtype], path / "model.safetensors", 0, {}
    for name, tensor in stored_tensors(model).items():
        nbytes = tensor.numel() * DTYPE_BYTES[dtype]
        entries[name] = TensorEntry(name, dtype, tuple(tensor.shape), file, offset, nbytes)
        offset += nbytes
    return Checkpoint(path, component.config, entries, (file,))


def write_headers(name: str, folder: Path) -> None:
    """Write a published model as a folder with sparse weight files: headers without data.

    Plans from headers (patterns, bytes, groups) are equal to those of the real folder.
    Raises: ConfigError, with the choices, if there is no such model.
    """
    from qexp.checkpoints.safetensors_file import make_header

    model = architecture(name)
    index = {key: value for key, value in model.model_index.items() if key[0] == "_" or key in model.components}
    _write_json(folder / "model_index.json", index)  # without a scheduler and tokenizers: there are none
    for component, part in model.components.items():
        _write_json(folder / component / "config.json", part.config)
        is_diffusers = "_class_name" in part.config
        file = folder / component / ("diffusion_pytorch_model.safetensors" if is_diffusers else "model.safetensors")
        checkpoint = as_checkpoint(part, network(part.config), folder)
        entries = checkpoint.entries.values()
        described = {entry.name: (entry.dtype, entry.shape, DTYPE_BYTES[entry.dtype]) for entry in entries}
        header = make_header(described, {"format": "pt"})
        file.write_bytes(header)
        os.truncate(file, len(header) + checkpoint.nbytes)


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value), encoding="utf-8")
