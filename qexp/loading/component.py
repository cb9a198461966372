"""The four states of a component on its way to a loaded model: requested, prepared, planned, loaded."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch
from torch import nn

from qexp.checkpoints.checkpoint import Checkpoint
from qexp.config.schema import ComponentConfig, LoaderConfig
from qexp.errors import ConfigError
from qexp.loading.device_map import DeviceMap
from qexp.loading.plan import LoadPlan
from qexp.models.base import ModelSource
from qexp.offloading.dispatch import Dispatch
from qexp.offloading.placement import Placement
from qexp.quantizers.base import Quantizer
from qexp.quantizers.rows import WeightSpec
from qexp.system.device_names import MaxMemory
from qexp.system.memory import GIB, PeakMemory


@dataclass(frozen=True)
class CacheFolder:
    """Where quantized weights are kept (`quantized_cache.py`).

    limit_gib: of all that is kept; None is a tenth of the disk that is free, or theirs. is_full: whether checkpoints
    are recognized by every byte (`identity=full`), not by samples. in_child: quantize in a process of its own what is
    to be kept: for a process that may be forked.
    """

    path: Path
    limit_gib: float | None = None
    is_full: bool = False
    in_child: bool = False

    @classmethod
    def of(cls, loader: LoaderConfig, **fields: bool) -> CacheFolder | None:
        """Return the folder that the loader's settings name, or None. fields: the others."""
        return None if loader.cache in (None, "auto") else cls(Path(str(loader.cache)), loader.cache_gib, **fields)


class LoadOptions(TypedDict, total=False):
    """The fields of `LoadRequest` that have defaults: where a component goes, and how."""

    device_map: DeviceMap
    max_memory: MaxMemory
    store: Path | None
    cache: CacheFolder | None
    warms_up_first: bool


@dataclass(frozen=True)
class LoadRequest:
    """What to load, how, and to where: one component of a model.

    checkpoint: opened, so that nobody opens it again; settings: merged with it (`models/component_settings.py`);
    max_memory: bytes, or sizes such as "10GiB", for each device, "cpu" and "disk"; store: the folder for what a map
    puts on disk; cache: where weights that were quantized before are looked for, and kept; warms_up_first: whether
    libraries and compiled loops are there before the first weight is read, so that their memory is not measured as the
    model's; open_seconds: what opening took.
    """

    source: ModelSource
    component: str
    checkpoint: Checkpoint
    settings: ComponentConfig
    device: torch.device
    device_map: DeviceMap = None
    max_memory: MaxMemory = None
    store: Path | None = None
    cache: CacheFolder | None = None
    warms_up_first: bool = True
    open_seconds: float = 0.0


@dataclass(frozen=True)
class Prepared:
    """Stages 1 to 6: everything decided, nothing read. named: the checkpoint under the names of the network."""

    request: LoadRequest
    model: nn.Module
    named: Checkpoint
    quantizer: Quantizer
    chosen: Mapping[str, WeightSpec]
    plan: LoadPlan
    compute_dtype: torch.dtype
    own_dtype: torch.dtype | None  # the checkpoint's, in which it computes if nothing is asked for
    unmatched: Mapping[str, Mapping[str, str]]  # setting -> pattern that matches no module -> what to say of it

    def check_patterns(self) -> None:
        """Raise ConfigError for a pattern that matches no module."""
        for message in (message for found in self.unmatched.values() for message in found.values()):
            raise ConfigError(message)


@dataclass(frozen=True)
class PlannedComponent:
    """A component that is prepared, where its parts will be, and the rest of its load."""

    prepared: Prepared
    placement: Placement
    rest: Generator[PlannedComponent, LoaderConfig, LoadedComponent] | None = None  # stages 7 to 9; runs once


@dataclass(frozen=True)
class LoadTimes:
    """Wall seconds of a load, from the call to the returned model.

    plan: headers, network without weights, and plan; warm_up: first use of libraries and compiled loops, once in a
    process; read: reading, quantizing, assigning, and the final checks.
    """

    plan: float
    warm_up: float
    read: float

    @property
    def total(self) -> float:
        return self.plan + self.warm_up + self.read


@dataclass(frozen=True)
class LoadedComponent:
    """A model ready to run, the plan it was loaded by, and what loading it took.

    cached: whether its quantized weights were kept from an earlier load, whose time and peaks these then are; None if
    it has none, or there is no cache.
    """

    model: nn.Module
    plan: LoadPlan
    times: LoadTimes
    memory: PeakMemory
    placement: Placement
    compute_dtype: torch.dtype
    cached: bool | None = None
    dispatch: Dispatch | None = None  # where the model runs over several devices, or rests where it does not compute


def plan_statistics(plans: Sequence[LoadPlan], weights_bytes: int) -> dict[str, float]:
    """Return counts of modules, and the `memory/` numbers of the weights.

    weights_bytes: true bytes of all components.
    """
    items = [item for plan in plans for item in plan.distinct]
    quantized = [item for plan in plans for item in plan.quantized]
    numel = sum(item.numel for item in items)
    left = sum(plan.left_dense_share * sum(item.numel for item in plan.distinct) for plan in plans)
    statistics: dict[str, float] = {
        "load/quantized_modules": len(quantized),
        "load/skipped_modules": sum(len(plan.skipped) for plan in plans),
        "load/left_dense_modules": sum(len(plan.left_dense) for plan in plans),
        "load/left_dense_share": left / max(numel, 1),
        "load/unused_tensors": sum(len(plan.unused) for plan in plans),
        "memory/weights_gib": weights_bytes / GIB,
        "memory/dense_weights_gib": sum(item.dense_nbytes for item in items) / GIB,
        "memory/model_bits_per_weight": 8 * weights_bytes / max(numel, 1),
    }
    if quantized:
        bits = 8 * sum(item.result_nbytes for item in quantized)
        statistics["memory/bits_per_weight"] = bits / sum(item.numel for item in quantized)
    return statistics
