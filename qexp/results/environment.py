"""Where a result was made: versions, machine, device and commit, found without importing torch.

`versions` has the packages that can change the result of this experiment, which the plugins name themselves
(`required_packages` of a backend's `Quantizer` and of a model's `Source`), and those that only handle it.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import socket
import subprocess
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from qexp.config.plugins import PACKAGE_FOLDER, plugin_module
from qexp.config.schema import RunConfig
from qexp.results.run_folder import now_iso
from qexp.system.machine_load import usable_cores
from qexp.version import __version__

RESULT_PACKAGES = ("qexp", "torch", "numpy", "safetensors")
OID = "# branch.oid "  # git-status(1), porcelain format version 2
OTHER_PACKAGES = ("hydra-core", "omegaconf", "wandb")


def result_packages(config: RunConfig) -> tuple[str, ...]:
    """Return the packages whose versions can change the result of this experiment."""
    backends = {name for component in config.components.values() for name in component.backend.methods()}
    quantizers = [plugin_module("backend", name).Quantizer for name in sorted(backends)]
    named = [package for quantizer in quantizers for package in quantizer.required_packages]
    return tuple(dict.fromkeys((*RESULT_PACKAGES, *model_packages(config), *named)))


def model_packages(config: RunConfig) -> tuple[str, ...]:
    """Return the packages that a model source computes with, beside torch."""
    return tuple(plugin_module("model", config.model.source).Source.required_packages)


def versions_of(packages: Iterable[str]) -> dict[str, str | None]:
    """Installed versions, None for what is not installed."""
    return {package: _package_version(package) for package in packages}


def describe_environment(config: RunConfig) -> dict[str, Any]:
    """Return the contents of env.json, for this process, now."""
    return {
        "versions": versions_of((*result_packages(config), *OTHER_PACKAGES)),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "usable_cores": usable_cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 2),
        "threads": number_of_threads(),
        "device": config.device,
        "device_name": device_name(config.device),
        "commit": package_commit(),
        "date": now_iso(),
    }


def differences(before: Mapping[str, Any], config: RunConfig) -> list[str]:
    """List the changes since `before` that could change a result or its times: 'torch 2.12.0 -> 2.13.0'."""
    then = {**before, **before.get("versions", {}), config.device: before.get("device_name")}
    now = _comparable(result_packages(config), config.device, number_of_threads())
    return [f"{name} {then.get(name)} -> {value}" for name, value in now.items() if then.get(name) != value]


@cache  # asked for each of a thousand experiments that are passed over; git alone takes 20 ms
def _comparable(packages: tuple[str, ...], device: str, threads: str) -> dict[str, str | int | None]:
    """Return the entries of env.json that a result may depend on, with the device under its own name."""
    return {
        **versions_of(packages),
        device: device_name(device),
        "python": platform.python_version(),
        "commit": package_commit(),
        "threads": threads,
        "host": socket.gethostname(),
        "cores": len(os.sched_getaffinity(0)),
        **({} if device == "cpu" else {"cpu": cpu_name()}),
    }


def number_of_threads() -> str:
    """Return how many threads torch computes with, as libraries read it from the environment."""
    names = ("MKL_NUM_THREADS", "OMP_NUM_THREADS")  # torch takes MKL's number if there is one
    return next((os.environ[name] for name in names if os.environ.get(name)), str(len(os.sched_getaffinity(0))))


def cpu_name() -> str:
    """Return the processor's model name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def device_name(device: str) -> str:
    """Return the model name of the compute device: of the processor for cpu, of the GPU for cuda:<index>."""
    kind, _, index = device.partition(":")
    return _cuda_name(int(index or 0)) if kind == "cuda" else cpu_name()


@cache  # what a process has imported stays as it was; one that forks workers asks before
def package_commit() -> str | None:
    return git_commit(PACKAGE_FOLDER.parent)


def git_commit(folder: Path) -> str | None:
    """Return the commit of a checkout, with a + if files differ from it; None for an installed package."""
    if not (folder / ".git").exists():
        return None
    state = _git(folder, "status", "--porcelain=v2", "--branch", "--untracked-files=no") or ""
    lines = state.splitlines()
    commit = next((line.removeprefix(OID) for line in lines if line.startswith(OID)), None)
    if commit in (None, "(initial)"):
        return None
    return f"{commit}+" if any(not line.startswith("#") for line in lines) else commit


def _package_version(package: str) -> str | None:
    if package == "qexp":
        return __version__  # of a checkout, metadata is that of the day it was set up
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cuda_name(index: int) -> str:
    """Ask the driver for a GPU's name, as torch would; return 'cuda' if there is none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "cuda"
    device, name = ctypes.c_int(0), ctypes.create_string_buffer(256)
    calls_failed = driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), index)
    return "cuda" if calls_failed or driver.cuDeviceGetName(name, len(name), device) else name.value.decode()


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, encoding="utf-8", timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
