"""A recipe of `backend=mixed`: rules that assign a format to each layer.

    name: edges                                          # in tables; default: the file's name
    rules:
      - {modules: [blocks.0, proj_out], backend: gguf}   # an option of conf/backend
      - {modules: "**.mlp", backend: gguf, quant_type: Q5_1}   # with any of its fields
      - {modules: "**.norm1", backend: none}             # stays dense
      - {backend: gguf_q4_0}                             # the default, which comes last

The first rule that covers a layer applies. Patterns are those of `module_patterns.py`: one, a list, or `@file`. A list
of rules without a name is a recipe, too. A resolved recipe has a backend's full config in place of an option, and a
checkpoint's recipe has names of layers in place of patterns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qexp.config.backend_options import backend_of
from qexp.config.dataclass_io import convert
from qexp.config.module_patterns import check_patterns, covering, patterns, union, unmatched_patterns
from qexp.config.plugins import plugin_config
from qexp.errors import ConfigError, first_names
from qexp.system.text_files import read_text

EXAMPLE = "backend.recipe=@recipe.yaml, or '[{modules: blocks.0, backend: gguf}, {backend: gguf_q4_0}]'"


@dataclass(frozen=True)
class Rule:
    """modules: patterns, empty for the default rule; backend: config of the backend for the covered layers."""

    modules: tuple[str, ...]
    backend: Any

    @property
    def format(self) -> str:
        return format_name(self.backend)

    def __str__(self) -> str:
        shown = ", ".join(self.modules[:3]) + (" …" if len(self.modules) > 3 else "")
        return f"{shown or 'default'} -> {self.format}"

    __repr__ = __str__


def format_name(backend: Any) -> str:
    """Return the name of a backend's config in tables: 'gguf Q4_0'."""
    method, label = backend.quant_method, backend.label or backend.describe()
    return method if label in (None, "", method) else f"{method} {label}"


def rule_for(rules: Sequence[Rule], layer: str) -> int:
    """Return the number of the first rule that covers a layer, or of the default."""
    decided = (number for number, rule in enumerate(rules) if not rule.modules or covering(rule.modules, layer))
    return next(decided)


def read_recipe(value: Any, place: str) -> tuple[str | None, tuple[Rule, ...]]:
    """Parse a recipe ("@file", its content, or parsed rules) into (name, rules).

    Raises: ConfigError for a rule that is empty, contradictory, or unreachable.
    """
    name = None
    if isinstance(value, str):
        name, value, place = Path(value).stem, _from_file(value, place), f"{place}={value}"
    if isinstance(value, Mapping):
        _check_keys(value, place)
        name, value = value.get("name", name), value["rules"]
    if not isinstance(name, str | None):
        raise ConfigError(f"{place}: name={name!r} must be a string")
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{place} must be a list of rules; give {EXAMPLE}")
    rules = tuple(_read_rule(rule, f"{place}: rule {number + 1}") for number, rule in enumerate(value))
    _check_order(rules, place)
    return name, rules


def _check_keys(value: Mapping[Any, Any], place: str) -> None:
    """Raise ConfigError unless the keys are 'rules' and perhaps 'name'."""
    others = [str(key)[:40] for key in value if key not in ("rules", "name")]
    if "rules" not in value:
        found = f"has {first_names(others)} and no 'rules'" if others else "is empty"
        raise ConfigError(f"{place} is not a recipe: it {found}; give {EXAMPLE}")
    if others:
        raise ConfigError(f"{place} has {first_names(others)}; a recipe has only 'rules' and, if wanted, 'name'")


def undecided_patterns(rules: Sequence[Rule], layers: Sequence[str], kept: Sequence[str], place: str) -> dict[str, str]:
    """Return the patterns that apply to no linear layer of a model, each with its message.

    kept: patterns of skip_modules and the like, which take precedence over a recipe.
    """
    found = unmatched_patterns((pattern for rule in rules for pattern in rule.modules), layers, place, "linear layer")
    by_layer = {layer: rule_for(rules, layer) for layer in layers}
    for number, rule in enumerate(rules):
        for pattern in rule.modules:
            covered = [layer for layer in layers if covering([pattern], layer)]
            decided = [layer for layer in covered if by_layer[layer] == number]
            this = f"{place}: the pattern {pattern!r} of rule {number + 1} ({rule})"
            if covered and all(by_layer[layer] < number for layer in covered):
                earlier = rules[by_layer[covered[0]]]
                found[pattern] = (
                    f"{this} is never reached: rules before it cover all of its layers ({first_names(covered)} by "
                    f"'{earlier}'); move it up, or remove it"
                )
            elif decided and rule.backend.is_quantizable() and all(covering(kept, layer) for layer in decided):
                found[pattern] = (
                    f"{this} quantizes nothing: skip_modules or keep_in_fp32_modules has "
                    f"{covering(kept, decided[0])!r}; remove one of the two "
                    "(model.skip_modules=[] empties the model's own list)"
                )
    return found


def _from_file(value: str, place: str) -> Any:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if not value.startswith("@"):
        raise ConfigError(f"{place}={value} must be @file, or a list of rules; give {EXAMPLE}")
    text = read_text(value[1:], f"{place}={value}", f"give a path from {Path.cwd()}, or a list of rules")
    try:
        return OmegaConf.to_container(OmegaConf.create(text), resolve=True)
    except (YAMLError, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{place}={value} is not valid yaml: {reason}; a pattern with * needs quotes") from None


def _read_rule(value: Any, place: str) -> Rule:
    if isinstance(value, Rule):
        return value
    if not isinstance(value, Mapping):
        raise ConfigError(f"{place} is {value!r}, not a group of fields; give {EXAMPLE}")
    fields = {str(key): item for key, item in value.items()}
    modules, backend = fields.pop("modules", None), fields.pop("backend", None)
    if isinstance(backend, Mapping):  # resolved before, or read from a checkpoint, whose layers have any characters
        if fields:
            raise ConfigError(f"{place} has {', '.join(fields)} beside a backend in full; put it into the backend")
        config = plugin_config("backend", backend, f"{place}: backend")
        names = union(convert(tuple[str, ...], modules, f"{place}: modules"))
    elif isinstance(backend, str):
        names = _read_modules(modules, place)
        try:
            config = backend_of(backend, fields)
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from None
    else:
        wrong = f"has backend={backend!r}" if "backend" in value else "has no backend"
        raise ConfigError(f"{place} {wrong}; give an option of conf/backend (none: the layers stay dense)")
    try:
        config.check_as_rule()
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from None
    return Rule(names, config)


def _read_modules(value: Any, place: str) -> tuple[str, ...]:
    if value in (None, "**", ["**"]):
        return ()
    given = (value,) if isinstance(value, str) and not value.startswith("@") else patterns(value, f"{place}: modules")
    if not given:
        raise ConfigError(f"{place}: modules={value} is empty; give a pattern, or leave modules out for a default")
    check_patterns(given, f"{place}: modules")
    return union(given)


def _check_order(rules: Sequence[Rule], place: str) -> None:
    """Raise ConfigError unless there is one default, at the end. An empty recipe is left to the caller."""
    if not rules:
        return
    for number, rule in enumerate(rules[:-1]):
        if not rule.modules:
            raise ConfigError(
                f"{place}: rule {number + 1} ({rule}) covers every layer, so later rules never apply; give it modules, "
                "or move it to the end"
            )
    if rules[-1].modules:
        raise ConfigError(
            f"{place}: the last rule ({rules[-1]}) is not a default; add a rule without modules, such as "
            "{backend: none}"
        )


def describe_formats(rules: Iterable[Rule]) -> str:
    """Return a short label of a recipe's formats, for recipes without a name."""
    names = list(dict.fromkeys(rule.format for rule in rules))
    return "+".join(names[:3]) + (f"+{len(names) - 3} more" if len(names) > 3 else "")
