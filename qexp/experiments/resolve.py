"""From Hydra's composed config to a resolved `RunConfig`: the only place that turns a `DictConfig` into settings.

Every setting is declared once, as a frozen dataclass beside the code that uses it (`config/schema.py` holds those of no
plugin, `config/generate.py` those that several models share). `to_run_config` builds them from the composed config,
whatever yaml it came from, and checks (`checks.py`) what depends on several fields; what it returns is resolved:
devices, dtypes, skip lists, one backend for every component. A model of a hub is downloaded here, so that its headers
can be read.
Importing this module imports neither torch nor a quantization library.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from qexp.checkpoints.checkpoint import open_components
from qexp.config.backend_options import default_backend
from qexp.config.dataclass_io import from_plain
from qexp.config.generate import GenerateConfig
from qexp.config.objectives import check_measured
from qexp.config.plugins import plugin_config
from qexp.config.schema import ComponentConfig, RunConfig, TopLevelConfig
from qexp.errors import ConfigError, LoadError
from qexp.experiments import checks
from qexp.hub.download import pinned_model
from qexp.models.base import ModelSource, load_source
from qexp.models.component_settings import merge_components, merge_with_checkpoint, parse_component
from qexp.quantizers.configs import compute_dtype
from qexp.scoring.perceptual_files import available_metrics
from qexp.system.devices import resolve_device_map, resolve_max_memory


def to_run_config(cfg: Any) -> RunConfig:
    """Resolve a composed config (a DictConfig, or a plain mapping of the same shape) into a `RunConfig`.

    Raises: ConfigError; UnsupportedError if the machine lacks the requested device.
    """
    top = from_plain(TopLevelConfig, plain_settings(cfg))
    model = plugin_config("model", top.model, "model")
    checks.check_reference_path(model)
    device, device_map = resolve_device_map(top.device, top.device_map)
    max_memory = resolve_max_memory(top.max_memory, top.device_map)
    if max_memory is not None and device_map is None:
        device_map = {"": device}  # one device, and a limit to check
    checks.check_offload(device_map, top.offload.strategy)
    base = parse_component({item.name: getattr(top, item.name) for item in fields(ComponentConfig)})
    task = plugin_config("task", top.task, "task")
    task = task.resolved()
    checks.check_placed(task, device_map, max_memory)
    checks.check_saves(top.save, task)
    check_measured(top.sweep.objectives, task.name, top.metrics.names, top.isolation.mode)
    metrics = available_metrics(top.metrics, load_source(model), task)
    checks.check_before_download(model, task, top)  # a mistake in the settings must not cost a download
    model = pinned_model(model)  # from here on it is on this machine
    source = load_source(model)
    components = merge_components(source, base, top.components)
    checks.check_reference_files(model)
    components = _with_embedded(source, components, device)
    # after the checkpoints had their say: a quantized one needs the streaming path too
    checks.check_streaming(top.low_cpu_mem_usage, components)
    checks.check_task(model, task)
    checks.check_sensitivity(task, source, components, top.offload)
    if isinstance(task, GenerateConfig):
        task = task.resolved_by(source.resolve_task)
    if top.save.path is not None:
        checks.check_save_path(Path(top.save.path).expanduser(), model, components)
    return RunConfig(
        model=replace(model, skip_modules=()),  # its patterns are in the components now: one place, one run key
        components=components,
        offload=top.offload.resolved(device.partition(":")[0]),
        task=task,
        reference=replace(top.reference, dtype=compute_dtype(top.reference.dtype, "reference.dtype")),
        device=device,
        device_map=device_map,
        max_memory=max_memory,
        metrics=metrics,
        **{name: getattr(top, name) for name in ("tracking", "isolation", "sweep", "loader")},
        **{name: getattr(top, name) for name in ("save", "paths", "seed", "resume", "identity")},
    )


def plain_settings(cfg: Any) -> dict[str, Any]:
    """Return the settings with interpolations resolved and Hydra's own node left out."""
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
            raise ConfigError(
                f"{error.full_key or name} does not resolve: {str(error).splitlines()[0]}; ${{…}} refers to another "
                "setting: if the characters are meant, put a backslash before them, in quotes: "
                f"'{error.full_key or name}=\"…\\${{…}}…\"'"
            ) from error
    return settings


def _with_embedded(
    source: ModelSource, components: Mapping[str, ComponentConfig], device: str
) -> dict[str, ComponentConfig]:
    try:
        opened = open_components(source)
    except LoadError:
        opened = {}  # reported with the experiment's key, which needs the checkpoints as well
    kind = device.partition(":")[0]
    return {
        name: merge_with_checkpoint(settings, opened.get(name), name, kind, unasked=default_backend())
        for name, settings in components.items()
    }
