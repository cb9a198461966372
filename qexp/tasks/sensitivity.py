"""The settings of `task=sensitivity`: what each format costs in each layer, in the model's output.

The samples are the task's own: images or prompts as `task=generate` takes them, with its steps and guidance, or the
windows of a text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, ClassVar

from typing_extensions import override

from qexp.config.backend_options import backend_of
from qexp.config.generate import GenerateConfig
from qexp.config.module_patterns import check_patterns
from qexp.config.plugins import plugin_config
from qexp.config.recipe import format_name
from qexp.config.yaml_options import option_names
from qexp.errors import ConfigError, choices, did_you_mean

SCORES = ("exact", "final", "gradient")
EXAMPLE = "task.formats='[gguf*, packed_uint4, {backend: gguf, quant_type: Q5_0}]'"
NO_FORMATS = ("none", "mixed")  # options of conf/backend that are no format
DEFAULT_FORMATS: tuple[Any, ...] = (
    "gguf*",
    "packed_uint*",
    *(
        {"backend": "packed_uint4", "quant_type": f"uint{bits}wo", "group_size": 256, "label": f"uint{bits}wo g256"}
        for bits in (3, 4, 5, 6, 8)
    ),
)
GROUPS_EXAMPLE = "task.groups='[[to_q,to_k,to_v],blocks.*.mlp]'"


@dataclass(frozen=True)
class SensitivityConfig(GenerateConfig):
    """score: exact quantizes one group of layers at a time, and compares the network's output at a few steps; final
    compares the samples that are generated to the end; gradient estimates exact from a few backward passes.

    formats: what is tried: options of conf/backend, where * stands for any characters (gguf*), or groups of an option
    and its fields ({backend: gguf, quant_type: Q5_0}); null: gguf*, packed integers of 2, 3 and 4 bits in groups of
    64, and of 3, 4, 5, 6 and 8 bits in groups of 256, without those that no layer can hold.
    groups: layers that are to have one format: a list of names, [to_q,to_k,to_v], of layers of one parent, or a
    pattern of modules, each with all its layers. samples: images or prompts (null: 16), or windows of the text (32).
    base: a format in which all other layers are meanwhile, as in formats; null: dense; not of
    score=gradient.
    states: steps of the schedule whose states are read. window: tokens of a window of the text (null: 64).
    projections: backward passes of score=gradient. Everything else is as of task=generate, text as of task=perplexity.
    """

    name: str = "sensitivity"
    score: str = "exact"
    formats: Any = None
    groups: Any = ()
    base: Any = None
    samples: int | None = None
    states: int = 5
    window: int | None = None
    projections: int = 4

    saves_outputs: ClassVar[bool] = False  # nothing to compare with a reference, or to score

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score not in SCORES:
            raise ConfigError(
                f"task.score={self.score!r} is unknown{did_you_mean(self.score, SCORES)}; use {choices(SCORES)}"
            )
        self.check_least(samples=1, states=1, window=2, projections=1)
        object.__setattr__(self, "formats", default_formats() if self.formats is None else read_formats(self.formats))
        object.__setattr__(self, "groups", read_groups(self.groups))
        if self.base is not None:
            object.__setattr__(self, "base", self._read_base())

    def _read_base(self) -> Any:
        if self.score == "gradient":
            raise ConfigError(
                f"task.base={self.base} is not for task.score=gradient; use exact or final, or leave it out"
            )
        config, *others = _read_entry(self.base, "task.base")
        names = [format_name(one) for one in self.formats]
        if others or format_name(config) not in names:
            raise ConfigError(f"task.base={self.base} must be one of task.formats: {choices(names)}")
        return config

    def resolved_by(self, resolve: Callable[[GenerateConfig], GenerateConfig]) -> SensitivityConfig:
        """Return the task with the fields of `task=generate` as a model source resolves them."""
        found = resolve(self.sampling())
        return replace(self, **{item.name: getattr(found, item.name) for item in fields(found) if item.name != "name"})

    def sampling(self) -> GenerateConfig:
        """Return the task by which its samples are generated."""
        names = [item.name for item in fields(GenerateConfig) if item.name != "name"]
        return GenerateConfig(**{name: getattr(self, name) for name in names})


Config = SensitivityConfig


@cache
def default_formats() -> tuple[Any, ...]:
    """Return the configs of what is tried if nothing is named."""
    return read_formats(DEFAULT_FORMATS)


def read_formats(value: Any) -> tuple[Any, ...]:
    """Return the backend configs that `task.formats` names, each once.

    Raises: ConfigError for an entry that is none, or that is about a whole model.
    """
    if not isinstance(value, list | tuple) or not value:
        raise ConfigError(f"task.formats={value} must be a list of formats; give {EXAMPLE}")
    found: dict[str, Any] = {}
    for number, entry in enumerate(value):
        for config in _read_entry(entry, f"task.formats[{number}]"):
            other = found.setdefault(format_name(config), config)
            if replace(other, label=None) != replace(config, label=None):
                raise ConfigError(
                    f"task.formats has two that tables would call {format_name(config)!r}; give one a label: "
                    "{backend: gguf, label: …}"
                )
    return tuple(found.values())


def _read_entry(entry: Any, place: str) -> Sequence[Any]:
    """Return the configs of one entry: an option, a pattern of options, an option with fields, or a config."""
    if hasattr(entry, "quant_method"):
        return [entry]
    if isinstance(entry, Mapping) and "quant_method" in entry:
        return [_checked(plugin_config("backend", entry, place), place)]
    options = [name for name in option_names("backend") if name not in NO_FORMATS]
    name, own = entry, dict[str, Any]()
    if isinstance(entry, Mapping):
        own = {str(key): item for key, item in entry.items()}
        name = own.pop("backend", None)
    if not isinstance(name, str):
        raise ConfigError(
            f"{place}={entry} is no format; give an option of conf/backend, or one with fields: {EXAMPLE}"
        )
    named = [option for option in options if fnmatchcase(option, name)]
    if not named or (own and len(named) > 1):
        why = "names several options" if named else f"is no format{did_you_mean(name, options)}"
        raise ConfigError(f"{place}={name} {why}; use {choices(options)}, and * for any characters")
    try:
        return [_checked(backend_of(option, own), place) for option in named]
    except ConfigError as error:
        raise ConfigError(f"{place}: {str(error).removeprefix(f'{place}: ')}") from None


def _checked(config: Any, place: str) -> Any:
    """Raise ConfigError for a config that is about a whole model, or whose cost is not in the weights alone."""
    try:
        config.check_as_rule()
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from None
    if config.quantizes_activations():
        raise ConfigError(
            f"{place}: {format_name(config)} quantizes activations, too, and scores are of weights alone; leave it out"
        )
    return config


def read_groups(value: Any) -> tuple[str | tuple[str, ...], ...]:
    """Return `task.groups`: a pattern each, or the names of siblings. Raises ConfigError."""
    if isinstance(value, str) or not isinstance(value, list | tuple):
        raise ConfigError(f"task.groups={value} must be a list; give {GROUPS_EXAMPLE}")
    found: list[str | tuple[str, ...]] = []
    for number, entry in enumerate(value):
        place = f"task.groups[{number}]"
        names = [entry] if isinstance(entry, str) else entry
        if not isinstance(names, list | tuple) or not names or not all(isinstance(name, str) for name in names):
            raise ConfigError(
                f"{place}={entry} must be a pattern of modules, or a list of names; give {GROUPS_EXAMPLE}"
            )
        check_patterns(names, place)
        if not isinstance(entry, str) and (starred := next((name for name in names if "*" in name), None)):
            raise ConfigError(f"{place}: {starred!r} is a pattern among names of siblings; write it beside the list")
        found.append(entry if isinstance(entry, str) else tuple(dict.fromkeys(names)))
    return tuple(found)
