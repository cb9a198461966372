"""The settings of a model's components, merged here for the command line, for `qexp.load` and for pipelines.

Three layers, each replacing what the one before says: the settings for the whole model, which hold for the components
that `backend=` quantizes; the component's own; and the quantization of a checkpoint that is quantized already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from typing import Any

from qexp.checkpoints.checkpoint import Checkpoint
from qexp.config.dataclass_io import check_known, convert
from qexp.config.module_patterns import patterns, union
from qexp.config.plugins import plugin_config
from qexp.config.schema import ComponentConfig
from qexp.errors import ConfigError, choices, did_you_mean
from qexp.models.base import ModelSource
from qexp.quantizers.configs import compute_dtype, plain
from qexp.quantizers.embedded import merge, stored_config
from qexp.quantizers.none import NoneConfig
from qexp.system.screen import say

ToBackend = Callable[[Any, str], Any]  # (what names a backend, its place in the settings) -> its config


def backend_from_fields(values: Any, place: str) -> Any:
    return plugin_config("backend", values, place)


def parse_component(
    values: Mapping[str, Any],
    place: str = "",
    *,
    base: ComponentConfig | None = None,
    to_backend: ToBackend = backend_from_fields,
) -> ComponentConfig:
    """Return `base` with the fields that `values` have.

    Args:
        values: fields of `ComponentConfig` as a user writes them; without a base, `backend` is one of them.
        place: what stands before their names in messages, with its dot.
        to_backend: from the ways to name a backend that are allowed here.
    Raises: ConfigError.
    """
    changes: dict[str, Any] = {}
    for name, value in values.items():
        where = f"{place}{name}"
        check_known(where, str(name), [item.name for item in fields(ComponentConfig)])
        if name == "backend":
            changes[name] = to_backend(value, where)
        elif name == "plain_fp8":
            changes[name] = convert(bool, value, where)
        elif name == "compute_dtype":
            changes[name] = compute_dtype(convert(str | None, plain(value), where), where)
        else:
            changes[str(name)] = union(patterns(value, where))
    return ComponentConfig(**changes) if base is None else replace(base, **changes)


def merge_components(
    source: ModelSource, base: ComponentConfig, own: Mapping[str, Any], *, to_backend: ToBackend = backend_from_fields
) -> dict[str, ComponentConfig]:
    """Return the settings of every component, from those for the whole model and what some have of their own.

    Raises: ConfigError for a component that the model has not, or a wrong field.
    """
    names, quantized = source.components(), source.quantized_components()
    check_component_names(own, names)
    with_backend = [name for name, values in own.items() if isinstance(values, Mapping) and "backend" in values]
    preset = source.preset_patterns({*quantized, *with_backend})
    base = replace(base, skip_modules=union(base.skip_modules, preset))
    # backend= and its skip lists are not for these: only a backend of its own quantizes one
    dense = ComponentConfig(NoneConfig(), compute_dtype=base.compute_dtype, plain_fp8=base.plain_fp8)
    merged = {}
    for name in names:
        values, place = own.get(name, {}), f"components.{name}"
        if not isinstance(values, Mapping):
            raise ConfigError(f"{place}={values} must be a group of fields, such as {place}.compute_dtype=bf16")
        start = base if name in quantized or name in with_backend else dense
        merged[name] = parse_component(values, f"{place}.", base=start, to_backend=to_backend)
    return merged


def check_component_names(names: Iterable[str], known: tuple[str, ...]) -> None:
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known)
            raise ConfigError(f"components.{name} is not a component of this model{hint}; use {choices(known)}")


def merge_with_checkpoint(
    settings: ComponentConfig, checkpoint: Checkpoint | None, component: str, device: str, *, unasked: Any = None
) -> ComponentConfig:
    """Return the settings with the backend that runs: the checkpoint's own, if that is quantized already.

    Args:
        checkpoint: None if it cannot be read, which is another's to report.
        device: type of the device to load for, on which a backend's defaults may depend.
        unasked: the backend that nobody chose; nothing is said where it loses.
    Raises: LoadError for a quantized checkpoint of a format that cannot be read.
    """
    backend = settings.backend.resolved(device)
    embedded = None if checkpoint is None else stored_config(checkpoint, backend)
    if checkpoint is None or embedded is None:
        return replace(settings, backend=backend)
    lost = merge(backend, embedded)
    if lost and (unasked is None or replace(backend, label=None) != replace(unasked, label=None)):
        say(f"warning: {component}: '{checkpoint.path}' is quantized already; unused: {', '.join(lost)}")
    return replace(settings, backend=embedded)
