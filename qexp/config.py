"""From Hydra's composed config to frozen dataclasses: the only place that knows `DictConfig`.

Every setting is declared once, as a frozen dataclass beside the code that uses it. Hydra gets an unfrozen twin of
each as its schema (a frozen structured config cannot be overridden at all); `to_run_config` converts the composed
config back into the frozen classes, whose `__post_init__` checks single fields, and does the cross-field checks.
Importing this module imports neither torch nor a quantization library.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import typing
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields, is_dataclass, make_dataclass, replace
from pathlib import Path
from typing import Any

from qexp.devices import resolve_device
from qexp.errors import ConfigError, choices
from qexp.offload.config import OffloadConfig

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
RESUME_MODES = ("missing", "failed", "stale", "none")
# group -> (package whose files are the options, the field that names the file)
PLUGINS = {
    "model": ("qexp.models", "source"),
    "backend": ("qexp.quantizers", "quant_method"),
    "task": ("qexp.tasks", "name"),
}


@dataclass(frozen=True)
class MetricsConfig:
    """names: the quality metrics to compute from the saved outputs."""

    names: tuple[str, ...] = ("psnr_db", "ssim", "relative_l2", "cosine", "class_accuracy", "frechet_distance")


@dataclass(frozen=True)
class TrackingConfig:
    """mode: offline (a .wandb file in the run folder), online, or none."""

    mode: str = "offline"
    project: str = "qexp"
    entity: str | None = None
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_choice("tracking.mode", self.mode, ("offline", "online", "none"))


@dataclass(frozen=True)
class IsolationConfig:
    """mode: process (each experiment in a process of its own) or inline (in this one, for debuggers)."""

    mode: str = "process"
    timeout_minutes: float | None = None

    def __post_init__(self) -> None:
        _check_choice("isolation.mode", self.mode, ("process", "inline"))
        if self.timeout_minutes is not None and self.timeout_minutes <= 0:
            raise ConfigError(f"isolation.timeout_minutes={self.timeout_minutes} must be above 0, or null for no limit")


@dataclass(frozen=True)
class SweepConfig:
    """name: folder below outputs/sweeps; notes: free text kept in the manifest."""

    name: str = "default"
    notes: str | None = None


@dataclass(frozen=True)
class LoaderConfig:
    """in_flight_mib: dense bytes read but not yet quantized (never less than the largest tensor);
    workers: quantizing threads, null for one a core."""

    in_flight_mib: int = 64
    workers: int | None = None

    def __post_init__(self) -> None:
        if self.in_flight_mib < 1:
            raise ConfigError(f"loader.in_flight_mib={self.in_flight_mib} must be 1 or more")
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"loader.workers={self.workers} must be 1 or more, or null for one a core")


@dataclass(frozen=True)
class ReferenceConfig:
    """dtype: of the unquantized model that outputs are compared with; null is the checkpoint's own.
    offload: strategy the reference is run with (it changes its memory, not its answer)."""

    dtype: str | None = None
    offload: str = "none"


@dataclass(frozen=True)
class PathsConfig:
    outputs: str = "outputs"


@dataclass(frozen=True)
class ComponentConfig:
    """How one component of a model (a transformer, a text encoder) is quantized."""

    backend: Any
    skip_modules: tuple[str, ...] = ()
    keep_in_fp32_modules: tuple[str, ...] = ()
    compute_dtype: str | None = None


@dataclass(frozen=True)
class RunConfig:
    """One experiment, completely resolved. `components` has every component that is loaded by our loader."""

    model: Any
    components: Mapping[str, ComponentConfig]
    offload: OffloadConfig
    task: Any
    metrics: MetricsConfig
    tracking: TrackingConfig
    isolation: IsolationConfig
    sweep: SweepConfig
    loader: LoaderConfig
    reference: ReferenceConfig
    paths: PathsConfig
    device: str
    seed: int
    resume: str


@dataclass(frozen=True)
class TopLevelConfig:
    """The scalars at the top of config.yaml, and a place for every group."""

    model: Any = None
    backend: Any = None
    offload: OffloadConfig = field(default_factory=OffloadConfig)
    task: Any = None
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    isolation: IsolationConfig = field(default_factory=IsolationConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
    components: dict[str, Any] = field(default_factory=dict)
    compute_dtype: str | None = None
    device: str = "auto"
    device_map: Any = None
    skip_modules: Any = ()
    keep_in_fp32_modules: tuple[str, ...] = ()
    low_cpu_mem_usage: bool = True
    seed: int = 0
    resume: str = "missing"


def plugin_names(group: str) -> list[str]:
    """The options of a plugin group: the modules of its package that declare a `Config`."""
    package = importlib.import_module(PLUGINS[group][0])
    names = [module.name for module in pkgutil.iter_modules(package.__path__) if not module.ispkg]
    return [name for name in names if hasattr(importlib.import_module(f"{package.__name__}.{name}"), "Config")]
