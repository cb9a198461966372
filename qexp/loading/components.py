"""A model of several components: all of them are planned before a weight of one is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Unpack, cast

import torch

from qexp.config.schema import ComponentConfig
from qexp.errors import ConfigError
from qexp.loading.component import LoadOptions, LoadRequest, PlannedComponent, Prepared
from qexp.loading.device_map import DeviceMap
from qexp.loading.fp32 import cast_between
from qexp.loading.lifecycle import plan_component, request_load
from qexp.models.base import ModelSource


def request_components(
    source: ModelSource,
    components: Mapping[str, ComponentConfig],
    *,
    device: torch.device,
    **options: Unpack[LoadOptions],
) -> dict[str, LoadRequest]:
    """`request_load` for every component, each with a folder of its own in `store`.

    device_map: of all of them, see `entries_of`. options: see `LoadRequest`.
    """
    requests, device_map, store = dict[str, LoadRequest](), options.get("device_map"), options.get("store")
    for name, settings in components.items():
        options["device_map"] = entries_of(device_map, name, list(components))
        options["store"] = None if store is None else store / name
        requests[name] = request_load(source, name, settings, device=device, **options)
    return requests


def plan_components(requests: Mapping[str, LoadRequest], *, travels: bool = False) -> dict[str, PlannedComponent]:
    """Plan all components; with a device map, each gets the memory that those before it have left.

    travels: they are offloaded as soon as they are loaded. What is not quantized is then loaded to the CPU: it need not
    fit on the device.
    Raises: what `load_component` raises before a weight is read.
    """
    planned, used = dict[str, PlannedComponent](), Counter[str]()
    for name, request in requests.items():
        if travels and request.settings.backend.quant_method == "none":
            request = replace(request, device=torch.device("cpu"), device_map=None, max_memory=None)
        elif request.max_memory is not None:
            limits = cast("Mapping[str, int]", request.max_memory)  # of several components: in bytes
            left = {place: max(size - used[place], 0) for place, size in limits.items()}
            request = replace(request, max_memory=left)
        planned[name] = plan_component(request)
        used.update(planned[name].placement.bytes_by_place())  # what it takes is not there for the next
    prepared = {name: component.prepared for name, component in planned.items()}
    check_shared_patterns(prepared, {name: request.settings for name, request in requests.items()})
    cast_between((component.prepared.model, component.prepared.compute_dtype) for component in planned.values())
    return planned


def entries_of(device_map: DeviceMap, component: str, names: Sequence[str]) -> DeviceMap:
    """Return the entries of a map by module that are for one of several components, by its own names of modules.

    An entry that begins with a component's name is for that one alone: "transformer.blocks.0", "transformer".
    """
    if not isinstance(device_map, Mapping) or len(names) < 2:
        return device_map
    owner = {module: next((n for n in names if f"{module}.".startswith(f"{n}.")), "") for module in device_map}
    shared = {module: place for module, place in device_map.items() if not owner[module]}
    own = {module: place for module, place in device_map.items() if owner[module] == component}
    return {**shared, **{module[len(component) + 1 :]: place for module, place in own.items()}}


def check_shared_patterns(prepared: Mapping[str, Prepared], components: Mapping[str, ComponentConfig]) -> None:
    """Raise ConfigError for a pattern that matches nothing.

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
