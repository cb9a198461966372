"""Which device an experiment computes on, found without importing torch (the parent process must stay light)."""

from __future__ import annotations

import ctypes
import importlib.util
import re
from functools import cache
from pathlib import Path

from qexp.errors import ConfigError, UnsupportedError

PLANNED_DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
SIZES = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip


@cache
def cuda_device_count() -> int:
    """CUDA devices that the installed torch could use: 0 for a CPU build or without a driver."""
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
    """'auto' -> 'cuda:0' or 'cpu'; 'cuda' -> 'cuda:0'. Raises ConfigError, or UnsupportedError without a GPU."""
    count = cuda_device_count()
    if device == "auto":
        return "cuda:0" if count else "cpu"
    if device == "cpu":
        return device
    kind, _, index = device.partition(":")
    if kind != "cuda" or not (index.isdigit() or device == "cuda"):
        raise ConfigError(f"{place}={device} is unknown; use auto, cpu, cuda or cuda:<index>")
    if int(index or 0) >= count:
        here = f"this machine has {count}" if count else "this machine, or its torch build, has none"
        raise UnsupportedError(f"{place}={device} needs CUDA device {int(index or 0)}, and {here}; use cpu or auto")
    return f"cuda:{int(index or 0)}"


def parse_bytes(size: object, device: object) -> int:
    """Bytes of one entry of max_memory: a whole number of them, or a size such as "10GiB" or "500MB".

    Raises: ConfigError.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", size) if isinstance(size, str) else None
    if match is None or match[2].upper() not in SIZES:
        raise ConfigError(f"max_memory[{device}]={size} is no size; use bytes, or a size such as 10GiB or 500MB")
    return int(float(match[1]) * SIZES[match[2].upper()])
