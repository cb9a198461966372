"""What `qexp fit` is asked for: its own words, told apart from the overrides of an experiment."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qexp.config.recipe import format_name
from qexp.errors import ConfigError, choices, did_you_mean
from qexp.metrics.registry import Metric, chosen_metrics
from qexp.quantizers.configs import BackendConfig
from qexp.system.devices import parse_bytes
from qexp.tasks.sensitivity import SCORES, read_formats

QUALITY = re.compile(r"\s*([a-z]\w*)\s*(>=|<=)\s*([^\s<>=]+)\s*")
SIGN = {"higher": ">=", "lower": "<="}


@dataclass(frozen=True)
class Quality:
    """A bound on a metric of the proof: at least `value` where higher is better, else at most."""

    metric: Metric
    value: float

    def is_reached(self, found: float) -> bool:
        return found >= self.value if self.metric.better == "higher" else found <= self.value

    def __str__(self) -> str:
        return f"{self.metric.short_name}{SIGN[self.metric.better]}{self.value:g}"


@dataclass(frozen=True)
class Request:
    """Args:
    overrides: of the experiment.
    memory: bytes of the device at most: weights, slots, and the larger of loading and activations.
    weights: bytes of all weights at most.
    bits: bytes of the layers that formats are chosen for at most, in bits of their weights.
    quality: the smallest mix that reaches it is sought.
    step_ms: milliseconds of a step at most.
    bandwidth: bytes a second at which weights that rest elsewhere travel to the device; None: measured.
    activations: bytes that running takes beside the weights; None: measured by the proof.
    scores: the folder of a finished sensitivity run; None: the stored one, or a new one.
    formats: the config of each candidate by its name; None: those of the scores.
    formats_text: as it was typed.
    score, groups: task.score and task.groups of the sensitivity run, stored or new.
    seeds: of the proof, how many.
    saving: overrides of `save`, for the recommended model alone.
    """

    overrides: tuple[str, ...]
    memory: int | None = None
    weights: int | None = None
    bits: float | None = None
    quality: Quality | None = None
    step_ms: float | None = None
    bandwidth: int | None = None
    activations: int | None = None
    scores: Path | None = None
    formats: Mapping[str, BackendConfig] | None = None
    formats_text: str | None = None
    score: str | None = None
    groups: str | None = None
    seeds: int = 3
    saving: tuple[str, ...] = ()

    @property
    def bounds(self) -> str:
        """The bounds as they are typed: 'memory=6GiB step_ms=80'."""
        words: dict[str, Any] = {"memory": _shown(self.memory), "weights": _shown(self.weights), "bits": self.bits}
        words |= {"quality": self.quality, "step_ms": self.step_ms}
        return " ".join(f"{name}={value}" for name, value in words.items() if value is not None)


def read_request(words: Sequence[str]) -> Request:
    """Sort the words of a command line. Raises: ConfigError, with the remedy, for one that is wrong."""
    own: dict[str, Any] = {}
    overrides: list[str] = []
    saving: list[str] = []
    for word in words:
        name, mark, value = word.partition("=")
        if name not in READERS:
            (saving if _group_of(word) == "save" else overrides).append(word)
            continue
        if not mark or not value:
            raise ConfigError(f"{word} has no value; write {name}={EXAMPLES[name]}")
        if name in own:
            raise ConfigError(f"{name}= is given twice; give it once")
        own[name] = READERS[name](value, name)
    _refuse([*overrides, *saving])
    formats = own.pop("formats", None)
    request = Request(tuple(overrides), **own, **({} if formats is None else dict(formats)), saving=tuple(saving))
    _check_together(request)
    return request


def _refuse(overrides: Sequence[str]) -> None:
    for override in overrides:
        name, group = override.lstrip("+~").partition("=")[0], _group_of(override)
        if override in ("-m", "--multirun") or override.startswith("-"):
            raise ConfigError(f"{override} is a flag of experiments; fit runs a sweep of its own")
        if group in ("offload", "device_map", "max_memory"):
            raise ConfigError(
                f"{override}: fit decides where layers rest: everything on the device, or with step_ms= also "
                "elsewhere; leave it out"
            )
        if name == "backend" or name.startswith("backend."):
            raise ConfigError(f"{override}: fit chooses the backend; leave it out, or name candidates: formats=[…]")
        if name == "save.push_to_hub" or (name == "save" and "push_to_hub" in override):
            raise ConfigError(
                f"{override}: fit may save several models until one keeps the bounds; push the recommended one with "
                "the command line that fit prints, and leave this out"
            )
        if group == "sweep":
            raise ConfigError(f"{override}: fit names its own sweep; leave it out")


def _group_of(override: str) -> str:
    """'save', of '+save.path=x'."""
    return re.split(r"[.@=]", override.lstrip("+~"), maxsplit=1)[0]


def _check_together(request: Request) -> None:
    if not request.bounds:
        raise ConfigError(f"there is no bound to fit; give one, such as {choices(BOUNDS)}")
    if request.weights is not None and request.bits is not None:
        raise ConfigError("weights= and bits= both bound the bytes of weights; give one of them")
    if request.step_ms is not None and request.memory is None:
        raise ConfigError("step_ms= lets layers rest off the device, which without memory= gains nothing; add memory=")
    if request.step_ms is not None and request.quality is not None:
        raise ConfigError("quality= seeks the smallest model, and step_ms= a fast one; give one of them")
    if request.bandwidth is not None and request.step_ms is None:
        raise ConfigError("bandwidth= is about what travels in a step; add step_ms=, or leave it out")
    if request.activations is not None and request.memory is None:
        raise ConfigError("activations= is a part of memory=; add memory=, or leave it out")


def _read_size(value: str, name: str) -> int:
    if value.strip().isdigit():
        raise ConfigError(f"{name}={value} has no unit; write {name}={value.strip()}GiB, or MiB or GB")
    found = parse_bytes(value, name)
    if found <= 0:
        raise ConfigError(f"{name}={value} must be above 0; write {name}={EXAMPLES[name]}")
    return found


def _read_rate(value: str, name: str) -> int:
    return _read_size(value.removesuffix("/s"), name)


def _read_positive(value: str, name: str) -> float:
    try:
        found = float(value)
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise ConfigError(f"{name}={value} must be a number above 0; write {name}={EXAMPLES[name]}")
    return found


def _read_count(value: str, name: str) -> int:
    if not value.isdigit() or int(value) < 1:
        raise ConfigError(f"{name}={value} must be a whole number, 1 or more; write {name}={EXAMPLES[name]}")
    return int(value)


def _read_quality(value: str, name: str) -> Quality:
    match = QUALITY.fullmatch(value.strip("'\""))
    if match is None:
        raise ConfigError(f"{name}={value} is no bound on a metric; write it in quotes: '{name}={EXAMPLES[name]}'")
    known = {short: metric for short, metric in chosen_metrics().items() if metric.better}
    if match[1] not in known:
        raise ConfigError(f"{name}={value}: the metric {match[1]!r} is unknown; use {choices(known)}")
    metric = known[match[1]]
    if match[2] != SIGN[metric.better]:
        raise ConfigError(
            f"{name}={value}: of {match[1]} the {metric.better} value is better; write {match[1]}{SIGN[metric.better]}…"
        )
    try:
        bound = float(match[3])
    except ValueError:
        bound = math.nan
    if not math.isfinite(bound):
        raise ConfigError(f"{name}={value}: {match[3]!r} is no number; write '{name}={EXAMPLES[name]}'")
    return Quality(metric, bound)


def _read_folder(value: str, name: str) -> Path:
    path = Path(value).expanduser()
    folder = path.parent if path.suffix in (".csv", ".json") else path
    if not folder.is_dir():
        raise ConfigError(f"{name}={value} is no folder; give that of a finished run of task=sensitivity")
    return folder


def _read_score(value: str, name: str) -> str:
    if value not in SCORES:
        raise ConfigError(f"{name}={value} is unknown{did_you_mean(value, SCORES)}; use {choices(SCORES)}")
    return value


def _read_candidates(value: str, name: str) -> dict[str, Any]:
    """Return fields of a `Request`. Raises: ConfigError for what is no list of formats, as task.formats takes it."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        listed = OmegaConf.to_container(OmegaConf.create(value), resolve=True)
    except (YAMLError, OmegaConfBaseException, ValueError):
        listed = None
    if not isinstance(listed, list) or not listed:
        raise ConfigError(f"{name}={value} must be a list of backends; write {name}={EXAMPLES[name]}")
    try:
        formats = read_formats(listed)
    except ConfigError as error:
        raise ConfigError(str(error).replace("task.formats", name)) from None
    return {"formats": {format_name(config): config for config in formats}, "formats_text": value}


def _shown(nbytes: int | None) -> str | None:
    if nbytes is None:
        return None
    unit = next((unit for unit in ("GiB", "MiB", "KiB") if nbytes >= UNITS[unit]), "B")
    return f"{nbytes / UNITS[unit]:.6g}{unit}"


UNITS = {"GiB": 1 << 30, "MiB": 1 << 20, "KiB": 1 << 10, "B": 1}
EXAMPLES = {
    "memory": "6GiB", "weights": "4GiB", "bits": "4.5", "quality": "psnr_db>=40", "step_ms": "80",
    "bandwidth": "20GB/s", "activations": "2GiB", "scores": "outputs/runs/<key>", "seeds": "3",
    "formats": "[gguf_q4_0,torchao]", "score": "gradient", "groups": "[[to_q,to_k,to_v]]",
}  # fmt: skip
READERS: dict[str, Callable[[str, str], Any]] = {
    "memory": _read_size, "weights": _read_size, "bits": _read_positive, "quality": _read_quality,
    "step_ms": _read_positive, "bandwidth": _read_rate, "activations": _read_size, "scores": _read_folder,
    "seeds": _read_count, "formats": _read_candidates, "score": _read_score, "groups": lambda value, name: value,
}  # fmt: skip
BOUNDS = [f"{name}={EXAMPLES[name]}" for name in ("memory", "weights", "bits", "quality")]
