"""Decide whether the experiments of a sweep keep quantized weights for each other (`loader.cache=auto`).

They share weights if something varies that does not decide them: the offloading, the task, the seed, the prompts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from qexp.config.schema import RunConfig

FOLDER = "quantized"  # in paths.outputs
DECIDING = {  # settings and groups by which the quantized weights of two experiments may differ
    "model", "backend", "components", "skip_modules", "keep_in_fp32_modules", "compute_dtype", "plain_fp8", "device",
    "device_map", "max_memory", "experiment",
}  # fmt: skip


def with_cache_folder(config: RunConfig, varying: Iterable[str]) -> RunConfig:
    """Return the configuration with a folder, or None, in place of `loader.cache=auto`.

    varying: names of the settings that vary in its sweep; none outside of one.
    """
    if config.loader.cache != "auto":
        return config
    shares = any(_group(name) not in DECIDING for name in varying)
    folder = str(Path(config.paths.outputs, FOLDER)) if shares else None
    return replace(config, loader=replace(config.loader, cache=folder))


def _group(name: str) -> str:
    """Return the group of a setting: of `backend@components.vae.backend` and `backend.quant_type`, backend."""
    return name.lstrip("+").partition("@")[0].partition(".")[0]
