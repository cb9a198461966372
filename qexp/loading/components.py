"""A model of several components: all of them are planned before a weight of one is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qexp.errors import ConfigError
from qexp.loading.component import PlannedComponent, Prepared
from qexp.loading.device_map import DeviceMap
from qexp.loading.fp32 import cast_between
from qexp.loading.lifecycle import plan_component, request_load

if TYPE_CHECKING:
    from qexp.config.schema import ComponentConfig
    from qexp.models.base import ModelSource


def plan_components(
    source: ModelSource,
    components: Mapping[str, ComponentConfig],
    *,
    device: torch.device,
    device_map: DeviceMap = None,
    max_memory: Mapping[str, int] | None = None,
    store: Path | None = None,
    travels: bool = False,
) -> dict[str, PlannedComponent]:
    """Plans of all components; with a device map, each gets the memory that those before it have left.

    travels: they are offloaded as soon as they are loaded. What is not quantized is then loaded to the CPU: it need not
    fit on the device. store: the folder for what goes to disk.
    Raises: what `load_component` raises before a weight is read.
    """
    planned: dict[str, PlannedComponent] = {}
    for name, settings in components.items():
        request = request_load(
            source,
            name,
            settings,
            device=device,
            device_map=device_map,
            max_memory=max_memory,
            store=None if store is None else store / name,
        )
        if travels and request.settings.backend.quant_method == "none":
            request = replace(request, device=torch.device("cpu"), device_map=None, max_memory=None)
        planned[name] = plan_component(request)
        if max_memory is not None:
            used = planned[name].placement.bytes_by_place()
            max_memory = {place: max(size - used.get(place, 0), 0) for place, size in max_memory.items()}
    check_shared_patterns({name: component.prepared for name, component in planned.items()}, components)
    cast_between((component.prepared.model, component.prepared.compute_dtype) for component in planned.values())
    return planned


def check_shared_patterns(prepared: Mapping[str, Prepared], components: Mapping[str, ComponentConfig]) -> None:
    """Raises ConfigError for a pattern that matches nothing.

    Components that share a list of patterns, or a backend that has patterns, share them: one of them must have a module
    that matches. In a list that is one component's own, each pattern must match there.
    """

    def sharing(name: str, setting: str, pattern: str) -> list[str]:
        own = components[name]
        shared = setting if setting != "backend" and pattern in getattr(own, setting) else "backend"
        return [other for other in prepared if getattr(components[other], shared) == getattr(own, shared)]

    for name, component in prepared.items():
        for setting, messages in component.unmatched.items():
            for pattern, message in messages.items():
                others = [prepared[other].unmatched[setting] for other in sharing(name, setting, pattern)]
                if all(pattern in unmatched for unmatched in others):
                    said = [unmatched[pattern] for unmatched in others]
                    raise ConfigError(next((words for words in said if "did you mean" in words), message))
