"""From Hydra's composed config to frozen dataclasses: the only place that knows `DictConfig`.

Every setting is declared once, as a frozen dataclass beside the code that uses it (`config/schema.py` holds those of no
plugin). `to_run_config` builds them from the composed config, whatever yaml it came from, and checks what depends on
several fields; what it returns is resolved: devices, dtypes, skip lists, one backend for every component.
Importing this module imports neither torch nor a quantization library.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from qexp.checkpoints.checkpoint import open_components, refuse_source
from qexp.config.dataclass_io import check_known, convert, from_plain
from qexp.config.offload import OffloadConfig
from qexp.config.plugins import PLUGINS, plugin_config, plugin_module, plugin_names
from qexp.config.schema import (
    ComponentConfig,
    IsolationConfig,
    LoaderConfig,
    MetricsConfig,
    PathsConfig,
    ReferenceConfig,
    RunConfig,
    SaveConfig,
    SweepConfig,
    TopLevelConfig,
    TrackingConfig,
)
from qexp.config.yaml_options import conf_folder, option_names, options_of_plugin
from qexp.errors import ConfigError, LoadError, choices, did_you_mean
from qexp.hub.download import hub_id, pinned_model
from qexp.hub.upload import check_ready
from qexp.models.base import load_source
from qexp.quantizers.configs import compute_dtype
from qexp.quantizers.embedded import merge, stored_config
from qexp.quantizers.none import NoneConfig
from qexp.scoring.perceptual_files import check_perceptual
from qexp.system.devices import resolve_device_map, resolve_max_memory

__all__ = [
    "PLUGINS",
    "ComponentConfig",
    "IsolationConfig",
    "LoaderConfig",
    "MetricsConfig",
    "OffloadConfig",
    "PathsConfig",
    "ReferenceConfig",
    "RunConfig",
    "SaveConfig",
    "SweepConfig",
    "TopLevelConfig",
    "TrackingConfig",
    "plugin_module",
    "plugin_names",
    "run_config_from_container",
    "to_run_config",
]


def to_run_config(cfg: Any) -> RunConfig:
    """Resolve a composed config (a DictConfig, or a plain mapping of the same shape) into a `RunConfig`.

    Raises: ConfigError; UnsupportedError if the machine lacks the requested device.
    """
    top = from_plain(TopLevelConfig, _plain_settings(cfg))
    model = plugin_config("model", top.model, "model")
    _check_reference_path(model)
    device, device_map = resolve_device_map(top.device, top.device_map)
    max_memory = resolve_max_memory(top.max_memory, top.device_map)
    if max_memory is not None and device_map is None:
        device_map = {"": device}  # one device, and a limit to check
    _check_offload(device_map, top.offload.strategy)
    base = ComponentConfig(
        backend=plugin_config("backend", top.backend, "backend"),
        skip_modules=patterns(top.skip_modules, "skip_modules"),
        keep_in_fp32_modules=union(top.keep_in_fp32_modules),
        compute_dtype=compute_dtype(top.compute_dtype, "compute_dtype"),
    )
    task = plugin_config("task", top.task, "task")
    task = task.resolved() if hasattr(task, "resolved") else task
    _check_placed(task, device_map, max_memory)
    _check_saves(top.save, task)
    check_perceptual(top.metrics, load_source(model), task)
    _check_before_download(model, task, top)
    model = pinned_model(model)  # from here on it is on this machine
    source = load_source(model)
    names = source.components()
    quantized = source.quantized_components() if hasattr(source, "quantized_components") else names
    _check_component_names(top.components, names)
    preset = model.skip_modules
    if hasattr(source, "preset_patterns"):
        own = [name for name, values in top.components.items() if isinstance(values, Mapping) and "backend" in values]
        preset = source.preset_patterns({*quantized, *own})
    base = replace(base, skip_modules=union(base.skip_modules, preset))
    components = {
        name: _component(base, top.components.get(name, {}), f"components.{name}", is_quantized=name in quantized)
        for name in names
    }
    components = {name: _resolved(component, device) for name, component in components.items()}
    _check_reference_files(model)
    components = _with_embedded(model, components)
    _check_streaming(top.low_cpu_mem_usage, components)
    _check_task(model, task)
    if task.name == "generate" and hasattr(source, "resolve_task"):
        task = source.resolve_task(task)
    if top.save.path is not None:
        _check_save_path(Path(top.save.path), model, components)
    return RunConfig(
        model=replace(model, skip_modules=()),  # its patterns are in the components now: one place, one run key
        components=components,
        offload=top.offload.resolved(device.partition(":")[0]),
        task=task,
        reference=replace(top.reference, dtype=compute_dtype(top.reference.dtype, "reference.dtype")),
        device=device,
        device_map=device_map,
        max_memory=max_memory,
        **{name: getattr(top, name) for name in ("metrics", "tracking", "isolation", "sweep", "loader")},
        **{name: getattr(top, name) for name in ("save", "paths", "seed", "resume")},
    )


def _check_saves(save: SaveConfig, task: Any) -> None:
    """Raises ConfigError for a model that is to be saved where there will be none, or cannot be sent."""
    if save.wanted and not getattr(task, "saves_outputs", True):
        raise ConfigError(
            f"{save.wanted} with task={task.name}: it goes layer by layer and leaves no model to save; "
            "use task=generate"
        )
    if save.push_to_hub is not None:
        check_ready(save)


def _check_before_download(model: Any, task: Any, top: TopLevelConfig) -> None:
    """What can be said of a hub's model before its files are here; all of it is asked again when they are."""
    if model.path is None or hub_id(model.path) is None:
        return
    with suppress(LoadError):
        _check_task(model, task)
        if getattr(model, "revision", None) is None:  # else the cache may have the components of another one
            _check_component_names(top.components, load_source(model).components())


def _check_task(model: Any, task: Any) -> None:
    """Raises ConfigError for a task that the model cannot do, in general or as it is configured."""
    source = load_source(model)
    if task.name not in source.tasks:
        raise ConfigError(
            f"task={task.name} is not for model.source={model.source}, which has {choices(source.tasks)}; "
            "choose another task, or another model"
        )
    if hasattr(source, "check_task"):
        source.check_task(task)


def _check_save_path(path: Path, model: Any, components: Iterable[str]) -> None:
    """Raises ConfigError for a folder that holds what the model, or its reference, is loaded from."""
    places = [path, *(path / name for name in components)]
    original = getattr(model, "reference_path", None)
    for config in (model, *([replace(model, path=original)] if original is not None else [])):
        try:
            sources = load_source(config).checkpoints().values()
        except LoadError:
            continue  # reported where it is opened
        for source in sources:
            for place in places:
                refuse_source(place, source, f"save.path={path}")


def run_config_from_container(container: Mapping[str, Any]) -> RunConfig:
    """Read back what `RunConfig.to_container` wrote; nothing is resolved again.

    Raises: ConfigError if the container has other fields than this version writes.
    """
    values = {"save": {}, **container}  # what was stored before there was such a setting had none
    for group in ("model", "task"):
        values[group] = plugin_config(group, values.get(group), group)
    components = {
        name: from_plain(ComponentConfig, component, f"components.{name}")
        for name, component in values.get("components", {}).items()
    }
    values["components"] = {
        name: replace(component, backend=plugin_config("backend", component.backend, f"components.{name}.backend"))
        for name, component in components.items()
    }
    config: RunConfig = from_plain(RunConfig, values)
    return config


def _plain_settings(cfg: Any) -> dict[str, Any]:
    """Interpolations resolved, Hydra's own node left out."""
    if isinstance(cfg, dict):
        return {str(key): value for key, value in cfg.items() if key != "hydra"}
    from omegaconf import OmegaConf
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    settings: dict[str, Any] = {}
    for name in (key for key in cfg if key != "hydra"):
        try:
            node = cfg[name]
            is_group = OmegaConf.is_config(node)
            settings[name] = OmegaConf.to_container(node, resolve=True, throw_on_missing=True) if is_group else node
        except MissingMandatoryValue as error:
            raise ConfigError(f"{error.full_key or name} is missing (???); give it a value") from error
        except OmegaConfBaseException as error:
            raise ConfigError(f"{error.full_key or name} does not resolve: {str(error).splitlines()[0]}") from error
    return settings


def _check_offload(device_map: Any, strategy: str) -> None:
    if device_map is not None and strategy != "none":
        raise ConfigError(
            f"device_map={device_map} says where each module rests, and so does offload.strategy={strategy}; use "
            "offload=none (what the map puts on the CPU or on disk is offloaded all the same), or one device"
        )


def _check_placed(task: Any, device_map: Any, max_memory: Any) -> None:
    """Raises ConfigError if there is no model to place as the map says."""
    if getattr(task, "saves_outputs", True):
        return
    given = f"device_map={device_map}" if isinstance(device_map, dict) and device_map.keys() != {""} else None
    if max_memory is not None:
        given = "max_memory"
    if given is not None:
        raise ConfigError(
            f"{given} with task={task.name}: it goes layer by layer on one device and places no model; leave it out, "
            "or use device"
        )


def _check_reference_path(model: Any) -> None:
    path = getattr(model, "reference_path", None)
    if path is not None and hub_id(path) is None and not Path(path).expanduser().exists():
        raise ConfigError(
            f"model.reference_path={path} does not exist; set it to the unquantized checkpoint to compare with, or "
            "leave it out"
        )


def _check_reference_files(model: Any) -> None:
    """Raises LoadError for a reference checkpoint that cannot be opened, by the setting that names it."""
    path = getattr(model, "reference_path", None)
    if path is None:
        return
    try:
        open_components(load_source(replace(model, path=path, reference_path=None)))
    except LoadError as error:
        raise LoadError(str(error).replace("model.path", "model.reference_path")) from error


def backend_of(option: str) -> Any:
    """The config of an option of conf/backend, as `backend=<option>` composes it. Raises: ConfigError."""
    from omegaconf import OmegaConf

    from qexp.config.hydra_schema import schema_of

    if option not in option_names("backend"):
        names = option_names("backend")
        raise ConfigError(f"backend={option!r} is unknown{did_you_mean(option, names)}; use {choices(names)}")
    written: Any = OmegaConf.load(conf_folder() / "backend" / f"{option}.yaml")
    plugin = next(name for name in plugin_names("backend") if option in options_of_plugin("backend", name))
    del written["defaults"]
    values = OmegaConf.merge(OmegaConf.structured(schema_of(plugin_module("backend", plugin).Config)), written)
    return plugin_config("backend", OmegaConf.to_container(values, resolve=True), "backend")


@cache
def default_backend() -> Any:
    """The backend that nobody asked for: the one in the defaults of conf/config.yaml."""
    from omegaconf import OmegaConf

    written: Any = OmegaConf.load(conf_folder() / "config.yaml")
    return backend_of(next(entry["backend"] for entry in written["defaults"] if "backend" in entry))


def model_skip_modules(option: str) -> tuple[str, ...]:
    """The modules that an option of conf/model leaves unquantized."""
    from omegaconf import OmegaConf

    written: Any = OmegaConf.load(conf_folder() / "model" / f"{option}.yaml")
    return tuple(written.get("skip_modules", ()))


def patterns(value: Any, place: str) -> tuple[str, ...]:
    """Skip patterns: a list, or "@file" with one pattern a line and # comments."""
    if not isinstance(value, str):
        patterns: tuple[str, ...] = convert(tuple[str, ...], value, place)
        return patterns
    if not value.startswith("@"):
        raise ConfigError(f"{place}={value} must be a list, such as [{value}], or @file with one pattern a line")
    try:
        lines = Path(value[1:]).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        remedy = f"give a path from {Path.cwd()}, or a list of patterns"
        raise ConfigError(f"{place}={value} cannot be read: {reason}; {remedy}") from error
    return tuple(pattern for line in lines if (pattern := line.partition("#")[0].strip()))


def union(*lists: tuple[str, ...]) -> tuple[str, ...]:
    """Sorted, since order means nothing: the same patterns are the same experiment."""
    return tuple(sorted({pattern for patterns in lists for pattern in patterns}))


def _check_component_names(names: Iterable[str], known: tuple[str, ...]) -> None:
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known)
            raise ConfigError(f"components.{name} is no component of this model{hint}; it has {choices(known)}")


def _component(base: ComponentConfig, values: Any, place: str, *, is_quantized: bool) -> ComponentConfig:
    """The base settings with what `components.<name>` says instead.

    is_quantized: whether `backend=` is for this component; another one is quantized only by a backend of its own.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{place}={values} must be a group of fields, such as {place}.compute_dtype=bf16")
    if not is_quantized and "backend" not in values:
        base = ComponentConfig(backend=NoneConfig(), compute_dtype=base.compute_dtype)
    changes: dict[str, Any] = {}
    for name, value in values.items():
        check_known(f"{place}.{name}", str(name), [item.name for item in fields(ComponentConfig)])
        if name == "backend":
            changes[name] = plugin_config("backend", value, f"{place}.backend")
        elif name == "compute_dtype":
            changes[name] = compute_dtype(convert(str | None, value, f"{place}.{name}"), f"{place}.{name}")
        else:
            changes[str(name)] = union(patterns(value, f"{place}.{name}"))
    return replace(base, **changes)


def _resolved(component: ComponentConfig, device: str) -> ComponentConfig:
    """With the backend that really runs on the device."""
    return replace(component, backend=component.backend.resolved(device.partition(":")[0]))


def _with_embedded(model: Any, components: Mapping[str, ComponentConfig]) -> dict[str, ComponentConfig]:
    """Each component with the backend that its checkpoint embeds, where it is quantized already: that one wins."""
    try:
        configs = open_components(load_source(model))
    except LoadError:
        return dict(components)  # reported with the experiment's key, which needs the checkpoint as well
    result = dict(components)
    for name, checkpoint in configs.items():
        if name not in result:
            continue
        embedded = stored_config(checkpoint, result[name].backend)
        if embedded is not None:
            lost = merge(result[name].backend, embedded)
            if lost and replace(result[name].backend, label=None) != replace(default_backend(), label=None):
                place = f"'{checkpoint.path}' is quantized already; unused"
                print(f"warning: {name}: {place}: {', '.join(lost)}", file=sys.stderr)
            result[name] = replace(result[name], backend=embedded)
    return result


def _check_streaming(low_cpu_mem_usage: bool, components: Mapping[str, ComponentConfig]) -> None:
    quantized = [name for name, component in components.items() if component.backend.quant_method != "none"]
    if quantized and not low_cpu_mem_usage:
        raise ConfigError(
            f"low_cpu_mem_usage=false cannot be combined with quantization (of {choices(quantized)}): there is only "
            "the streaming path, which never holds the dense model; use low_cpu_mem_usage=true, or backend=none"
        )
