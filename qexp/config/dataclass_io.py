"""Convert plain containers to typed dataclasses and back, with a check of every field.

Hydra's schemas check most fields while composing, but a yaml without a schema, and a stored config.yaml, are only
checked here.
"""

from __future__ import annotations

import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

from qexp.errors import ConfigError, choices, did_you_mean

WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "a string", type(None): "null"}


@cache
def field_types(cls: type) -> dict[str, Any]:
    """Return the resolved type of every field of a dataclass, in order."""
    hints = typing.get_type_hints(cls)
    return {item.name: hints[item.name] for item in fields(cls)}


def from_plain(cls: type, values: Any, place: str = "") -> Any:
    """Build a dataclass from a mapping; `place` is its dotted path in the config, for messages.

    Raises: ConfigError for an unknown or missing field, or a value of another type.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{place or 'the configuration'}={values} must be a group of {choices(field_types(cls))}")
    expected = field_types(cls)
    prefix = f"{place}." if place else ""
    for name in values:
        check_known(prefix + str(name), str(name), list(expected))
    for item in fields(cls):
        if item.name not in values and item.default is MISSING and item.default_factory is MISSING:
            raise ConfigError(f"{prefix}{item.name} is missing; give it a value")
    return cls(**{name: convert(expected[name], value, prefix + name) for name, value in values.items()})


def check_known(place: str, name: str, names: list[str]) -> None:
    if name not in names:
        raise ConfigError(f"{place} is not a known field{did_you_mean(name, names)}; valid here: {choices(names)}")


def convert(hint: Any, value: Any, place: str, rule: str = "") -> Any:
    """Convert `value` to the type `hint`: a scalar, union with None, tuple, dict or dataclass. Raises ConfigError.

    rule: for the message, if not the type's own description.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        refuse_word_for_null(value, place)
        check_finite(value, place)
        return value
    if origin in (typing.Union, types.UnionType):
        refuse_word_for_null(value, place)
        return None if value is None else convert(_only_type(arguments), value, place, rule=describe(hint))
    if is_dataclass(hint) and isinstance(hint, type):
        return value if isinstance(value, hint) else from_plain(hint, value, place)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(convert(arguments[0], item, f"{place}[{i}]") for i, item in enumerate(value))
    if origin in (dict, Mapping) and isinstance(value, Mapping):
        return {str(key): convert(arguments[1], item, f"{place}.{key}") for key, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is hint:
        check_finite(value, place)
        return value
    raise ConfigError(f"{place}={value!r} must be {rule or describe(hint)}")


def refuse_word_for_null(value: Any, place: str) -> None:
    """Raise ConfigError for 'None' in place of yaml's null: it would be read as a text, a path or a name."""
    if value in ("None", "nil", "undefined"):
        raise ConfigError(f"{place}={value} is the text '{value}'; for no value write {place}=null")


def check_path(value: str | None, place: str, remedy: str) -> None:
    """Raise ConfigError for an empty path, which would mean the current folder, or a web address."""
    if value is not None and not value.strip():
        raise ConfigError(f"{place}={value} is empty; {remedy}")
    address = re.match(r"(?:https?|hf)://(?:huggingface\.co/)?([\w.-]+/[\w.-]+)?", value or "")
    if address:
        name = address[1] or "user/name"
        raise ConfigError(f"{place}={value} is an address, not a path; {remedy}, or a repository: {place}={name}")


def check_folder(value: str | None, place: str) -> None:
    """Raise ConfigError for a folder that cannot be created: an empty name, an address, or a path through a file."""
    check_path(value, place, "give a folder, which need not exist")
    path = Path(value or ".")
    file = next((part for part in (path, *path.parents) if part.is_file()), None)
    if file is not None:
        raise ConfigError(f"{place}={value}: '{file}' is a file; give a folder, which need not exist")


def check_finite(value: Any, place: str) -> None:
    """Raise ConfigError for NaN or infinity, at any depth of a plain value.

    Comparisons with NaN are false, so it passes limits; JSON cannot hold it, so a finished run would be lost when its
    result is written.
    """
    if isinstance(value, Mapping):
        for key, item in value.items():
            check_finite(item, f"{place}.{key}")
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            check_finite(item, f"{place}[{number}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{place}={value} must be a finite number; give one (or quote it, if it is a text)")


def describe(hint: Any) -> str:
    """Describe a type for users: 'an integer, or null'."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return f"{describe(_only_type(typing.get_args(hint)))}, or null"
    if origin is tuple:
        return "a list, such as [a,b]"
    return "a group of fields" if origin in (dict, Mapping) or is_dataclass(hint) else WORDS.get(hint, str(hint))


def to_plain(value: Any) -> Any:
    """Convert dataclasses to dicts and tuples to lists, recursively."""
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: to_plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    return [to_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _only_type(arguments: tuple[Any, ...]) -> Any:
    """Return the X of `X | None`. Unions of other types are not supported."""
    (kind,) = [argument for argument in arguments if argument is not type(None)]
    return kind
