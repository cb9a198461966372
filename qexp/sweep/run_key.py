"""The name of an experiment: a hash of everything that can change its result, and of nothing else.

Run key: 16 hex digits of sha256 over canonical JSON (sorted keys, no spaces, 6.0 written as 6) of the resolved
configuration without NOT_IN_KEY, names and locations; the content of every file that the model is made of, its
checkpoints and what lies beside them (a tokenizer, generation_config.json, a scheduler); and the device.
Fields that other settings make meaningless are dropped: a plugin's config may name its own in an optional method
`ignored_fields() -> set[str]`.

Reference key: the same of the unquantized model that runs are compared with, by device type only, plus the versions
of the libraries that compute it; without how it is offloaded, which does not change its answer.

A field added to `RunConfig` is part of the key until it is listed here: a needless second run is cheaper than a wrong
reuse. Library versions are not in the run key: `resume=stale` looks at them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from qexp.checkpoints.checkpoint import open_component, open_components
from qexp.checkpoints.content import content_digest
from qexp.config.schema import RunConfig
from qexp.errors import ConfigError, LoadError
from qexp.experiments.reference import reference_config, saves_outputs, unquantized_model
from qexp.models.base import ModelSource, load_source
from qexp.quantizers.embedded import is_quantized
from qexp.results.environment import model_packages, versions_of

KEY_DIGITS = 16
SCHEMA = 2  # raised when the same settings come to mean something else; 2: files count by their content
NOT_IN_KEY = {"metrics", "tracking", "resume", "identity", "isolation", "sweep", "paths", "loader", "save"}
NAMES_AND_PLACES = {
    "label",
    "path",
    "reference_path",
    "revision",
    "checkpoint",
}  # of a plugin's config; checkpoints count by their content


def run_key(config: RunConfig) -> str:
    """Raise LoadError if a checkpoint is missing or damaged."""
    return _digest(_identity(config))


def reference_key(config: RunConfig) -> str:
    """Key of the reference of `config`, the same for all candidates that share one."""
    identity = _identity(reference_config(config))
    # they move weights and change no bit of the outputs
    for name in ("offload", "device_map", "max_memory"):
        identity.pop(name, None)
    identity["device"] = config.device.partition(":")[0]  # the same numbers on each GPU of a machine
    identity["versions"] = versions_of(("qexp", "torch", *model_packages(config)))
    return _digest(identity)


def _identity(config: RunConfig) -> dict[str, Any]:
    identity = {item.name: _plain(getattr(config, item.name)) for item in fields(config) if item.name not in NOT_IN_KEY}
    # how a reference is computed is part of its own settings; here only which one the result is compared with counts
    identity["reference"] = config.reference.dtype if saves_outputs(config) else None
    if not saves_outputs(config):  # no model is placed, or its place does not change what is measured
        for name in ("offload", "device_map", "max_memory"):
            del identity[name]
    if not config.task.is_seeded:
        del identity["seed"]
    for name in ("device_map", "max_memory"):  # so that runs from before there were such settings keep their names
        if identity.get(name, "") is None:
            del identity[name]
    for name in config.task.input_files():
        del identity["task"][name]  # their content counts, not where they are
    source = load_source(config.model)
    is_full = config.identity == "full"
    identity["checkpoints"] = _contents(source, is_full)  # by content: a copy elsewhere is the same model
    if side_files := source.side_files():
        identity["side_files"] = _digests(side_files)
    if adapters := source.adapters():
        identity["adapters"] = [
            [*map(content_digest, adapter.files()), _plain(adapter.weight), adapter.component] for adapter in adapters
        ]
    is_dense = all(component.backend.quant_method == "none" for component in config.components.values())
    if is_dense and not saves_outputs(config) and source.is_pipeline:
        identity["measured"] = list(source.quantized_components())  # else those with a backend are
    originals = _originals(config, is_full)
    if originals:
        identity["originals"] = originals
    if files := {**config.task.input_files(), **config.model.input_files()}:
        identity["input_files"] = {name: _input_digest(name, path) for name, path in files.items()}
    identity["schema"] = SCHEMA
    return identity


def _originals(config: RunConfig, is_full: bool) -> dict[str, Any]:
    """Content of what a checkpoint that is quantized is compared with: its outputs with those of a whole model, its
    weights with those of the same components."""
    if not config.model.has_original:
        return {}
    stored = open_components(load_source(config.model))
    if not any(map(is_quantized, stored.values())):
        return {}
    source = load_source(unquantized_model(config.model))
    if not saves_outputs(config):
        names = [name for name in stored if is_quantized(stored[name])]
        return {name: open_component(source, name).content_hash(full=is_full) for name in names}
    return {"checkpoints": _contents(source, is_full), "side_files": _digests(source.side_files())}


def _contents(source: ModelSource, is_full: bool) -> dict[str, str]:
    """Component -> hash of its checkpoint."""
    return {name: found.content_hash(full=is_full) for name, found in open_components(source).items()}


def _digests(files: Sequence[Path]) -> list[list[str]]:
    return [[file.name, content_digest(file)] for file in files]


def _input_digest(name: str, path: Path) -> str:
    try:
        return content_digest(path)
    except LoadError as error:
        reason = str(error.__context__.strerror) if isinstance(error.__context__, OSError) else "it is no regular file"
        raise ConfigError(f"{name} {path} cannot be read: {reason}; give a file that is there") from error


def _plain(value: Any) -> Any:
    """Plain values of a config, without what does not count."""
    if is_dataclass(value) and not isinstance(value, type):
        ignored = NAMES_AND_PLACES | (value.ignored_fields() if hasattr(value, "ignored_fields") else set())
        return {item.name: _plain(getattr(value, item.name)) for item in fields(value) if item.name not in ignored}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    # 6.0 and 6 are one experiment
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _digest(identity: dict[str, Any]) -> str:
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:KEY_DIGITS]
