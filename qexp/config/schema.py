"""The settings that belong to no plugin, as frozen dataclasses; `RunConfig` is one experiment, completely resolved.

Backends, model sources and tasks declare theirs beside the code that uses them; those of `task=generate`, which several
models share, are in `config/generate.py`. A field's `__post_init__` checks it alone; what depends on several fields is
checked in `experiments/resolve.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any

from qexp.config.dataclass_io import check_folder, convert, to_plain
from qexp.config.module_patterns import check_patterns
from qexp.config.objectives import check_objectives
from qexp.config.offload import STRATEGIES, OffloadConfig
from qexp.config.wandb_names import MAX_TAG, problem_of_project
from qexp.errors import ConfigError, choices, did_you_mean
from qexp.metrics.registry import chosen_metrics

RESUME_MODES = ("missing", "failed", "stale", "none")
IDENTITIES = ("sampled", "full")
METRICS = chosen_metrics()
QUALITY_METRICS = tuple(
    name for name, metric in METRICS.items() if metric.setting is None
)  # of each run, those that its
# outputs have; the others need files that may not be here
PERCEPTUAL_METRICS = {name: metric.setting for name, metric in METRICS.items() if metric.setting is not None}


def check_choice(place: str, value: object, names: tuple[str, ...]) -> None:
    if value not in names:
        raise ConfigError(f"{place}={value} is unknown{did_you_mean(value, names)}; use {choices(names)}")


@dataclass(frozen=True)
class MetricsConfig:
    """names: the quality metrics to compute from the saved outputs. lpips_net: the classifier of lpips, alex or vgg;
    clip_model: that of clip_score, a folder or a repository in the cache; fid_images: a folder of real images to
    compare with, null for the reference's; missing: what to do about a metric whose files are not on this machine:
    error, or leave_out with the command that fetches them."""

    names: tuple[str, ...] = QUALITY_METRICS
    lpips_net: str = "alex"
    clip_model: str = "openai/clip-vit-base-patch16"
    fid_images: str | None = None
    missing: str = "error"

    def __post_init__(self) -> None:
        for name in self.names:
            check_choice("metrics.names", name, tuple(METRICS))
        check_choice("metrics.missing", self.missing, ("error", "leave_out"))
        check_choice("metrics.lpips_net", self.lpips_net, ("alex", "vgg"))

    def scored(self) -> dict[str, Any]:
        """Return the record of a result's scoring: the metrics' names, and the settings that change their values."""
        settings = {setting for name, setting in PERCEPTUAL_METRICS.items() if name in self.names}
        return {"names": list(self.names), **{setting: getattr(self, setting) for setting in sorted(settings)}}


@dataclass(frozen=True)
class TrackingConfig:
    """mode: offline (a .wandb file in the run folder), online, or none."""

    mode: str = "offline"
    project: str = "qexp"
    entity: str | None = None
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_choice("tracking.mode", self.mode, ("offline", "online", "none"))
        if self.mode == "none":
            return
        if problem := problem_of_project(self.project):
            raise ConfigError(f"tracking.project={self.project!r} {problem}, as W&B demands; give another name")
        if wrong := [tag for tag in self.tags if not 1 <= len(tag) <= MAX_TAG]:
            raise ConfigError(
                f"tracking.tags: {wrong[0]!r} must have 1 to {MAX_TAG} characters, as W&B demands; shorten it, or use "
                "sweep.notes"
            )


@dataclass(frozen=True)
class IsolationConfig:
    """mode: process (each experiment in a process of its own) or inline (in this one, for debuggers).

    start: how such a process starts. fork: from a server that has imported the libraries once; spawn: with a fresh
    Python, seconds slower.
    """

    mode: str = "process"
    start: str = "fork"
    timeout_minutes: float | None = None

    def __post_init__(self) -> None:
        check_choice("isolation.mode", self.mode, ("process", "inline"))
        check_choice("isolation.start", self.start, ("fork", "spawn"))
        if self.timeout_minutes is None:
            return
        if self.timeout_minutes <= 0:
            raise ConfigError(f"isolation.timeout_minutes={self.timeout_minutes} must be above 0, or null for no limit")
        if self.mode == "inline":
            raise ConfigError(
                f"isolation.timeout_minutes={self.timeout_minutes} needs a process to end, but isolation.mode=inline "
                "has none; use isolation=process, or isolation.timeout_minutes=null"
            )


@dataclass(frozen=True)
class SweepConfig:
    """name: folder below outputs/sweeps; notes: free text kept in the manifest; dry_run: say what would run, and run
    nothing; objectives: metrics whose values Hydra's sweeper gets from each experiment."""

    name: str = "default"
    notes: str | None = None
    dry_run: bool = False
    objectives: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.name or self.name.startswith(".") or "/" in self.name:
            raise ConfigError(f"sweep.name={self.name!r} must be a folder's name: not empty, without /, no . in front")
        check_objectives(self.objectives)


@dataclass(frozen=True)
class LoaderConfig:
    """in_flight_mib: staging buffer (MiB) for tensors read whole; grows to the largest one. workers: threads that read
    and quantize; null: one per core that the process may use. map: whether weights that stay on the CPU as they are in
    their file are mapped and not read: auto (those that are aligned), true (says how much is not), false. cache: folder
    that keeps quantized weights for later loads; auto: <paths.outputs>/quantized in a sweep whose experiments share
    some, else none. cache_gib: its limit; null: a tenth of the free disk."""

    in_flight_mib: int = 64
    workers: int | None = None
    map: Any = "auto"
    cache: str | None = "auto"
    cache_gib: float | None = None

    def __post_init__(self) -> None:
        if self.cache != "auto":
            check_folder(self.cache, "loader.cache")
        convert(float | None, self.cache_gib, "loader.cache_gib")
        if self.cache_gib is not None and not 0 < self.cache_gib < inf:
            raise ConfigError(f"loader.cache_gib={self.cache_gib} must be a number above 0, or null")
        if self.map != "auto" and type(self.map) is not bool:
            raise ConfigError(f"loader.map={self.map!r} must be auto, true or false")
        convert(int, self.in_flight_mib, "loader.in_flight_mib")
        convert(int | None, self.workers, "loader.workers")
        if self.in_flight_mib < 1:
            raise ConfigError(f"loader.in_flight_mib={self.in_flight_mib} must be 1 or more; the default is 64")
        if self.workers is not None and self.workers < 1:
            raise ConfigError(
                f"loader.workers={self.workers} must be 1 or more, or null for one per core that the process may use"
            )


@dataclass(frozen=True)
class ReferenceConfig:
    """dtype: of the unquantized model that outputs are compared with; null: the checkpoint's own. offload: strategy of
    the reference run (it affects memory, not outputs)."""

    dtype: str | None = None
    offload: str = "none"

    def __post_init__(self) -> None:
        check_choice("reference.offload", self.offload, STRATEGIES)


@dataclass(frozen=True)
class SaveConfig:
    """Settings for saving the quantized model.

    path: folder. max_shard_gib: largest file. interchange: keep the format's own name even if the model's library
    would misread it (quanto with transformers). layout: null (the network's) or "file": of the checkpoint's file, as
    ComfyUI reads it, for GGUF. push_to_hub: repository to upload to, user/name. private: create the
    repository as private; null: account default. revision: branch; null: main. commit_message: null names the backend.
    """

    path: str | None = None
    max_shard_gib: float = 5.0
    interchange: bool = False
    layout: str | None = None
    push_to_hub: str | None = None
    private: bool | None = None
    revision: str | None = None
    commit_message: str | None = None

    @property
    def wanted(self) -> str:
        """Return the requested destinations as the user wrote them; '' if the model is not saved."""
        places = {name: getattr(self, name) for name in ("path", "push_to_hub")}
        return " ".join(f"save.{name}={place}" for name, place in places.items() if place is not None)

    def __post_init__(self) -> None:
        check_folder(self.path, "save.path")
        if not 0 < self.max_shard_gib < inf:
            raise ConfigError(f"save.max_shard_gib={self.max_shard_gib} must be a number above 0")
        if self.layout not in (None, "file"):
            raise ConfigError(f"save.layout={self.layout} is unknown; use file, or null for the network's own")
        if self.layout is not None and not self.wanted:
            raise ConfigError(f"save.layout={self.layout} needs a place to save to; set save.path=<folder>, too")
        hub = {name: getattr(self, name) for name in ("private", "revision", "commit_message")}
        for name, value in hub.items():
            if value is not None and self.push_to_hub is None:
                raise ConfigError(f"save.{name}={value} needs a hub's repository; set save.push_to_hub=user/name, too")
            if value == "":
                raise ConfigError(f"save.{name} must not be empty; give it a value, or null")


@dataclass(frozen=True)
class PathsConfig:
    """outputs: where runs, references and sweeps are kept."""

    outputs: str = "outputs"

    def __post_init__(self) -> None:
        check_folder(self.outputs, "paths.outputs")


@dataclass(frozen=True)
class ComponentConfig:
    """Settings of one component of a model (a transformer, a text encoder)."""

    backend: Any
    skip_modules: tuple[str, ...] = ()
    keep_in_fp32_modules: tuple[str, ...] = ()
    compute_dtype: str | None = None
    plain_fp8: bool = False  # read float8 weights without scales as a plain cast

    def __post_init__(self) -> None:
        check_patterns(self.skip_modules, "skip_modules")
        check_patterns(self.keep_in_fp32_modules, "keep_in_fp32_modules")


@dataclass(frozen=True)
class RunConfig:
    """One experiment, completely resolved. `components` has every component that qexp's loader loads."""

    model: Any
    components: Mapping[str, ComponentConfig]
    offload: OffloadConfig
    task: Any
    metrics: MetricsConfig
    tracking: TrackingConfig
    isolation: IsolationConfig
    sweep: SweepConfig
    loader: LoaderConfig
    save: SaveConfig
    reference: ReferenceConfig
    paths: PathsConfig
    device: str
    seed: int
    resume: str
    identity: str = "sampled"  # how large files of a checkpoint are told apart: sampled, full
    device_map: Any = None  # auto, …, or module -> device or "disk"; null if everything is on `device`
    max_memory: Mapping[str, int] | None = None  # bytes by device, "cpu" and "disk"

    def to_container(self) -> dict[str, Any]:
        """Convert to plain dicts, lists and scalars for YAML and JSON; `run_config_from_container` reads them."""
        return to_plain(self)


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
    save: SaveConfig = field(default_factory=SaveConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
    components: dict[str, Any] = field(default_factory=dict)
    compute_dtype: str | None = None
    device: str = "auto"
    device_map: Any = None
    max_memory: Any = None
    skip_modules: Any = ()
    keep_in_fp32_modules: tuple[str, ...] = ()
    plain_fp8: bool = False
    low_cpu_mem_usage: bool = True
    seed: int = 0
    resume: str = "missing"
    identity: str = "sampled"

    def __post_init__(self) -> None:
        check_choice("resume", self.resume, RESUME_MODES)
        check_choice("identity", self.identity, IDENTITIES)
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed={self.seed} must be from 0 to {2**63 - 1}, the range of torch's generators")
