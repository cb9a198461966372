"""Parse the device names of device_map and max_memory, and check them against this machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import psutil
import torch

from qexp.errors import ConfigError, choices, did_you_mean
from qexp.system.devices import PLANNED_DEVICE_MAPS, parse_bytes

Key = int | str  # of a device: an accelerator's index, "cpu" or "disk"
DISK = "disk"
CPU = torch.device("cpu")

Place = torch.device | str  # a device, or DISK
MaxMemory = Mapping[str, int] | Mapping[int | str, int | str] | None


def parse_place(value: Any, device: torch.device) -> Place:
    """Parse a value of a device map. An index is an accelerator of the kind of `device`.

    Raises: ConfigError for a device that this machine lacks.
    """
    kind = accelerator_kind(device)
    if isinstance(value, int) and not isinstance(value, bool):
        value = f"{kind}:{value}"
    if value == DISK:
        return DISK
    try:
        place = torch.device(value)
    except (RuntimeError, TypeError):
        place = torch.device("meta")
    if place.type == "cpu":
        return torch.device("cpu")
    count = torch.get_device_module(kind).device_count() if place.type == kind else 0
    if (place.index or 0) >= count:
        known = [*PLANNED_DEVICE_MAPS, "cpu", DISK, *(f"{kind}:{index}" for index in range(count))]
        raise ConfigError(
            f"device_map has {value!r}{did_you_mean(str(value), known)}; this machine has {choices(known)}"
        )
    return torch.device(kind, place.index or 0)


def accelerator_kind(device: torch.device) -> str:
    if device.type != "cpu":
        return device.type
    found = torch.accelerator.current_accelerator()
    return found.type if found is not None else "cuda"


def key_of(place: Place) -> Key:
    if isinstance(place, str) or place.type == "cpu":
        return str(place)
    return place.index or 0


def place_of_key(key: Key, device: torch.device) -> Place:
    return DISK if key == DISK else device_of_key(key, device)


def device_of_key(key: Key, device: torch.device) -> torch.device:
    return torch.device(accelerator_kind(device), key) if isinstance(key, int) else torch.device(key)


def limits_of(max_memory: MaxMemory, device: torch.device) -> dict[Key, int]:
    """Return the usable bytes of each device, in the order of filling: as given, or what is free."""
    if max_memory is not None:
        given = {
            key_of(parse_place(_number(name), device)): parse_bytes(size, f"max_memory[{name}]")
            for name, size in max_memory.items()
        }
        order = [*sorted(key for key in given if isinstance(key, int)), "cpu", DISK]
        return {key: given[key] for key in order if key in given}
    if device.type == "cpu":
        return {"cpu": psutil.virtual_memory().available}
    if device.type == "cuda":
        from accelerate.utils import get_max_memory

        return dict(get_max_memory())
    module = torch.get_device_module(device)
    free: dict[Key, int] = {index: module.mem_get_info(index)[0] for index in range(module.device_count())}
    return {**free, "cpu": psutil.virtual_memory().available}


def _number(name: int | str) -> int | str:
    return int(name) if isinstance(name, str) and name.isdigit() else name
