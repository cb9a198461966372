"""Reject settings that do not go together, before anything is downloaded or loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from qexp.checkpoints.checkpoint import open_components, refuse_source
from qexp.config.offload import OffloadConfig
from qexp.config.schema import ComponentConfig, SaveConfig, TopLevelConfig
from qexp.errors import ConfigError, LoadError, choices
from qexp.hub.download import hub_id
from qexp.hub.upload import check_ready
from qexp.models.base import load_source
from qexp.models.component_settings import check_component_names


def check_saves(save: SaveConfig, task: Any) -> None:
    """Raise ConfigError for a model that is to be saved where there will be none, or cannot be sent."""
    if save.wanted and not task.saves_outputs:
        raise ConfigError(
            f"{save.wanted} with task={task.name}: it goes layer by layer and leaves no model to save; "
            "use task=generate"
        )
    if save.push_to_hub is not None:
        check_ready(save)


def check_before_download(model: Any, task: Any, top: TopLevelConfig) -> None:
    """Check a hub's model as far as that is possible before its files are here.

    All of it is asked again when they are.
    """
    if model.path is None or hub_id(model.path) is None:
        return
    with suppress(LoadError):
        check_task(model, task)
        if model.revision is None:  # else the cache may have the components of another one
            check_component_names(top.components, load_source(model).components())


def check_task(model: Any, task: Any) -> None:
    """Raise ConfigError for a task that the model cannot do, in general or as it is configured."""
    source = load_source(model)
    if task.name not in source.tasks:
        raise ConfigError(
            f"task={task.name} is not for model.source={model.source}, which has {choices(source.tasks)}; "
            "choose another task, or another model"
        )
    source.check_task(task)


def check_save_path(path: Path, model: Any, components: Iterable[str]) -> None:
    """Raise ConfigError for a folder that holds what the model, or its reference, is loaded from."""
    places = [path, *(path / name for name in components)]
    original = model.reference_path
    for config in (model, *([replace(model, path=original)] if original is not None else [])):
        try:
            sources = load_source(config).checkpoints().values()
        except LoadError:
            continue  # reported where it is opened
        for source in sources:
            for place in places:
                refuse_source(place, source, f"save.path={path}")


def check_offload(device_map: Any, strategy: str) -> None:
    if device_map is not None and strategy != "none":
        raise ConfigError(
            f"device_map={device_map} says where each module rests, and so does offload.strategy={strategy}; use "
            "offload=none (what the map puts on the CPU or on disk is offloaded all the same), or one device"
        )


def check_placed(task: Any, device_map: Any, max_memory: Any) -> None:
    """Raise ConfigError if there is no model to place as the map says."""
    if task.saves_outputs:
        return
    given = f"device_map={device_map}" if isinstance(device_map, dict) and device_map.keys() != {""} else None
    if max_memory is not None:
        given = "max_memory"
    if given is not None:
        raise ConfigError(
            f"{given} with task={task.name}: it goes layer by layer on one device and places no model; leave it out, "
            "or use device"
        )


def check_reference_path(model: Any) -> None:
    path = model.reference_path
    if path is not None and hub_id(path) is None and not Path(path).expanduser().exists():
        raise ConfigError(
            f"model.reference_path={path} does not exist; set it to the unquantized checkpoint to compare with, or "
            "leave it out"
        )


def check_reference_files(model: Any) -> None:
    """Raise LoadError for a reference checkpoint that cannot be opened, by the setting that names it."""
    path = model.reference_path
    if path is None:
        return
    try:
        open_components(load_source(replace(model, path=path, reference_path=None)))
    except LoadError as error:
        raise LoadError(str(error).replace("model.path", "model.reference_path")) from error


def check_streaming(low_cpu_mem_usage: bool, components: Mapping[str, ComponentConfig]) -> None:
    quantized = [name for name, component in components.items() if component.backend.quant_method != "none"]
    if quantized and not low_cpu_mem_usage:
        raise ConfigError(
            f"low_cpu_mem_usage=false cannot be combined with quantization (of {choices(quantized)}): there is only "
            "the streaming path, which never holds the dense model; use low_cpu_mem_usage=true, or backend=none"
        )


def check_sensitivity(
    task: Any, source: Any, components: Mapping[str, ComponentConfig], offload: OffloadConfig
) -> None:
    """Raise ConfigError for what task=sensitivity cannot score."""
    if task.name != "sensitivity":
        return
    for name, component in components.items():
        if component.backend.quant_method != "none":
            raise ConfigError(
                f"task=sensitivity with components.{name}.backend={component.backend.quant_method}: it loads the "
                "unquantized model, and tries task.formats; use backend=none, and a checkpoint that is not quantized"
            )
    if offload.strategy != "none" and (offload.strategy, task.score) != ("block", "gradient"):
        raise ConfigError(
            f"task=sensitivity with offload.strategy={offload.strategy} and task.score={task.score}: weights are "
            "exchanged where they are; use offload=none, or offload=block with task.score=gradient"
        )
    of_other = ("samples", "text", "window", "batch_size") if source.modality == "text" else ()
    for item in fields(type(task)) if of_other else ():
        is_own = item.name in (*of_other, "name", "score", "formats", "groups", "base", "projections")
        if not is_own and getattr(task, item.name) not in (item.default, {}):
            raise ConfigError(
                f"task.{item.name}={getattr(task, item.name)} is of no use with task=sensitivity of a language model, "
                f"which reads a text; it takes {choices(of_other)}"
            )
    if source.modality == "text" and task.score == "final":
        raise ConfigError(
            "task.score=final is of samples that are generated by steps, and a language model reads a text; use "
            "task.score=exact"
        )
    if source.modality != "text" and task.window is not None:
        raise ConfigError(f"task.window={task.window} is of windows of a text; leave it out, or set task.samples")
