"""What the text of a user's module says about a factory, before anything of it is imported: names, and their types."""

from __future__ import annotations

import ast
import shlex
from collections.abc import Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from qexp.config.dataclass_io import WORDS
from qexp.errors import ConfigError, choices, did_you_mean

SCALARS: Mapping[str, type] = {"int": int, "float": float, "bool": bool, "str": str, "None": type(None)}


def as_module_name(name: str) -> str:
    """Return the spelling of a factory that was given as a file or with a dot, for a message; '' if unclear."""
    path, colon, function = name.rpartition(":")
    if not colon:
        path, _, function = (name, "", "<function>") if name.endswith(".py") else name.rpartition(".")
    place = Path(path.removesuffix(".py"))
    parts = [part for part in place.parts if part not in ("/", ".")]
    is_elsewhere = place.is_absolute() or ".." in parts
    module = parts[-1:] if is_elsewhere else parts
    if not module or not function:
        return ""
    if not all(part.isidentifier() for part in ".".join(module).split(".")):
        return f"; '{path}' can be no module's name: rename it with letters, digits and _ alone"
    where = f", and start it with PYTHONPATH={shlex.quote(str(place.parent))}" if is_elsewhere else ""
    return f"; write model.factory={'.'.join(module)}:{function}{where}"


def parsed(spec: ModuleSpec) -> ast.Module | None:
    """Return a module's text; None if it has none. Raises ConfigError for one that is no Python."""
    if spec.origin is None or not spec.origin.endswith(".py"):
        return None
    try:
        return ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError) as error:
        raise ConfigError(
            f"model.factory: '{spec.origin}' is no Python file that can be read: {error}; mend it"
        ) from error


def check_arguments(name: str, module: ast.Module | None, given: Mapping[str, Any]) -> None:
    """Raise ConfigError for an argument that the factory `name` does not take, or whose type is another one than it
    declares; what the text does not say is left to the call."""
    found = _find_parameters(module, name.partition(":")[2]) if module is not None else None
    if found is None:
        return
    known = {argument.arg: argument for argument in found}
    for key, value in given.items():
        if key not in known:
            takes = f"it takes {choices(known)}" if known else "it takes none"
            raise ConfigError(f"model.arguments.{key}{did_you_mean(key, known)} is no argument of {name}; {takes}")
        types = _declared_types(known[key])
        if types and not _is_any(value, types):
            wanted = choices(WORDS[kind] for kind in types)
            raise ConfigError(
                f"model.arguments.{key}={value!r} must be {wanted}, as {name} declares it; write it so in "
                f"model.arguments='{{{key}: …}}' (in quotes it is a text)"
            )


def _find_parameters(module: ast.Module, function: str) -> list[ast.arg] | None:
    """Return the parameters of a function, or of a class's own __init__; None if it takes any, or is not found."""
    node = next((n for n in module.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == function), None)
    before = 0
    if isinstance(node, ast.ClassDef):
        node = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
        before = 1  # self
    if node is None or node.args.kwarg is not None or node.args.posonlyargs or node.decorator_list:
        return None
    return [*node.args.args[before:], *node.args.kwonlyargs]


def _declared_types(argument: ast.arg) -> list[type]:
    """Return the scalar types that a parameter is declared to take; [] if it says nothing, or more than such types."""
    if argument.annotation is None:
        return []
    names = [part.strip() for part in ast.unparse(argument.annotation).strip("'\"").split("|")]
    return [SCALARS[name] for name in names] if all(name in SCALARS for name in names) else []


def _is_any(value: object, types: list[type]) -> bool:
    return type(value) in types or (type(value) is int and float in types)
