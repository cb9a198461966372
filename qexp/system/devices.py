"""Resolve the compute device of an experiment without importing torch (the parent process must stay light)."""

from __future__ import annotations

import ctypes
import importlib.util
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from qexp.errors import ConfigError, UnsupportedError, choices, did_you_mean

EVERYTHING_ELSE = "*"  # in a map: unnamed modules. Libraries use "", which Hydra's command line cannot hold
PLANNED_DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
SIZES = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip


@cache
def cuda_device_count() -> int:
    """Return the number of CUDA devices that the installed torch could use: 0 for a CPU build or without a driver."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return 0
    if not any(Path(spec.submodule_search_locations[0], "lib").glob("*torch_cuda*")):
        return 0
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def resolve_device(device: str, place: str = "device") -> str:
    """Resolve 'auto' to 'cuda:0' or 'cpu', 'cuda' to 'cuda:0'. Raises ConfigError, UnsupportedError without a GPU."""
    count = cuda_device_count()
    if device == "auto":
        return "cuda:0" if count else "cpu"
    if device == "cpu":
        return device
    kind, _, index = device.partition(":")
    if kind != "cuda" or not (index.isdigit() or device == "cuda"):
        meant = f"cuda:{device}" if device.isdigit() else {"gpu": "cuda"}.get(kind.lower(), "")
        hint = f" (did you mean {meant}?)" if meant else ""
        raise ConfigError(f"{place}={device} is unknown{hint}; use auto, cpu, cuda or cuda:<index>")
    if int(index or 0) >= count:
        here = f"this machine has {count}" if count else "this machine, or its torch build, has none"
        raise UnsupportedError(f"{place}={device} needs CUDA device {int(index or 0)}, and {here}; use cpu or auto")
    return f"cuda:{int(index or 0)}"


def resolve_device_map(device: str, device_map: Any) -> tuple[str, str | dict[str, str] | None]:
    """Return (main device, map with full device names, or None if everything is on the main device).

    Maps by module, and planned ones such as auto, are applied when the model's weights are known.
    Raises: ConfigError; UnsupportedError for a device that this machine lacks.
    """
    if device_map is None:
        return resolve_device(device), None
    if isinstance(device_map, str) and device_map in PLANNED_DEVICE_MAPS:
        if device not in ("auto", "cpu"):
            raise ConfigError(
                f"device_map={device_map} uses all accelerators, which contradicts device={device}; leave one of them "
                f"out, or limit the plan: max_memory={{0: 20GiB}}"
            )
        return resolve_device(device), device_map
    named = device_map if isinstance(device_map, Mapping) else {"": device_map}
    named = {"" if name == EVERYTHING_ELSE else str(name): value for name, value in named.items()}
    written = {name: f"device_map[{name}]" if name else "device_map" for name in named}
    places = {name: _resolve_place(value, written[name]) for name, value in named.items()}
    main = next((place for place in places.values() if place not in ("cpu", "disk")), "cpu")
    if device != "auto" and resolve_device(device) != main:
        raise ConfigError(f"device_map={device_map} and device={device} disagree; set only one of them")
    return main, None if places == {"": main} else places


def _resolve_place(value: Any, place: str) -> str:
    if value == "disk":
        return "disk"
    name = f"cuda:{value}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    if name.partition(":")[0] not in ("cpu", "cuda"):
        devices = ["cpu", "cuda:<index>", "disk"]
        known = [*PLANNED_DEVICE_MAPS, *devices] if place == "device_map" else devices
        raise ConfigError(f"{place}={value} is unknown{did_you_mean(value, known)}; use {choices(known)}")
    return resolve_device(name, place)


def resolve_max_memory(max_memory: Any, device_map: Any) -> dict[str, int] | None:
    """Return bytes by device, "cpu" and "disk". Raises ConfigError, UnsupportedError for a missing device."""
    if max_memory is None:
        return None
    if device_map is None:
        raise ConfigError(
            f"max_memory={max_memory} limits a device_map, and none is set; set device_map, such as device_map=auto"
        )
    if not isinstance(max_memory, Mapping):
        raise ConfigError(f"max_memory={max_memory} must give a size for each device, such as {{0: 10GiB, cpu: 30GiB}}")
    sizes = {}
    for name, size in max_memory.items():
        device = int(name) if isinstance(name, str) and name.isdigit() else name
        sizes[_resolve_place(device, f"max_memory[{name}]")] = parse_bytes(size, f"max_memory[{name}]")
    return sizes


def parse_bytes(size: object, place: str) -> int:
    """Parse a size: a number of bytes, or text such as "10GiB" or "500MB". place: the setting.

    Raises: ConfigError.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", size) if isinstance(size, str) else None
    if match is None or match[2].upper() not in SIZES:
        raise ConfigError(f"{place}={size} is not a size; use bytes, or a size such as 10GiB or 500MB")
    return int(float(match[1]) * SIZES[match[2].upper()])
