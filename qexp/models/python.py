"""A network of the user's own: a function or class that builds it, and a checkpoint with its weights.

    python -m qexp model=python model.factory=nets:build model.checkpoint=weights.safetensors task=forward …

`package.module:function` is imported from `folder`, else the current directory, or from whatever is installed. It is
called while new parameters get no memory (they are on the meta device), so it must not compute with them. It is given
the fields of the checkpoint's config.json that it has parameters for, and `model.arguments`, which win; a single
parameter `config` gets the whole of config.json. Of what defines the network, the file of its module is part of a run's
key; files that this one imports are not.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from qexp.config.dataclass_io import check_path
from qexp.config.model import ModelConfig
from qexp.errors import ConfigError, choices, did_you_mean
from qexp.hub.download import local_folder
from qexp.models.base import ModelSource
from qexp.models.python_text import as_module_name, check_arguments, parsed

PACKAGE = Path(__file__).parents[1]

if TYPE_CHECKING:
    from torch import nn

NOT_THE_NETWORKS = ("quantization_config", "torch_dtype", "dtype", "architectures", "model_type")


@dataclass(frozen=True)
class PythonConfig(ModelConfig):
    """factory: package.module:function; folder: where its module is (null: the current directory, which is what a run
    stores, or what is installed); checkpoint: its weights, a .safetensors or .gguf file, or a folder with such
    files and a config.json if they are several, or user/name of a hub's repository, of which revision is a branch, tag
    or commit (model.path is another word for it); arguments: of the factory; reference_path: the
    unquantized checkpoint to compare with where `checkpoint` is quantized already."""

    source: str = "python"
    factory: str | None = None
    folder: str | None = None
    checkpoint: str | None = None
    arguments: Any = None

    @override
    def __post_init__(self) -> None:
        check_path(self.checkpoint, "model.checkpoint", "give a .safetensors file")
        super().__post_init__()
        if self.checkpoint is not None and self.path not in (None, self.checkpoint):
            raise ConfigError(
                f"model.checkpoint={self.checkpoint} and model.path={self.path} mean the same; set only one"
            )
        object.__setattr__(self, "path", self.path or self.checkpoint)  # by one name for all that asks for it
        object.__setattr__(self, "checkpoint", None)
        if self.arguments is not None and not isinstance(self.arguments, Mapping):
            raise ConfigError(
                f"model.arguments={self.arguments} must be names and values: model.arguments='{{width: 64}}'"
            )

    @override
    def input_files(self) -> dict[str, Path]:
        """Return the module's file, whose content is what counts. Raises ConfigError if there is none so called."""
        module, _ = split_name(self.factory)
        spec = find_module(module, self.folder)
        return {"factory": Path(spec.origin)} if spec.origin is not None else {}

    @override
    def with_paths(self, absolute: Callable[[str], str]) -> PythonConfig:
        found = self.folder or folder_of(split_name(self.factory)[0])
        return replace(self, folder=absolute(found) if found is not None else None)

    def ignored_fields(self) -> set[str]:
        """Leave the folder out of a run's key: the module counts by its content."""
        return {"folder"}


Config = PythonConfig


class Source(ModelSource):
    """A network with one component, "model"."""

    @override
    def components(self) -> tuple[str, ...]:
        return ("model",)

    @override
    def checkpoints(self) -> dict[str, Path]:
        if self.config.path is None:
            raise ConfigError(
                "model.checkpoint=null names no weights, and quantizing random ones says nothing; save the network's "
                "state_dict with safetensors.torch.save_file, and set model.checkpoint to the file"
            )
        return {"model": _without_config(local_folder(self.config.path))}

    @override
    def check_task(self, task: Any) -> None:
        """Raise ConfigError for a factory that is not there, or inputs that this network has no tokenizer for."""
        module, function = split_name(self.config.factory)
        spec = find_module(module, self.config.folder)
        known = defined_names(spec)
        if known is not None and function not in known:
            raise ConfigError(
                f"model.factory={self.config.factory}: '{module}' defines no {function!r}"
                f"{did_you_mean(function, known)}; it has {choices(sorted(known)[:12])}"
            )
        check_arguments(str(self.config.factory), parsed(spec), self.config.arguments or {})
        if task.name == "forward" and task.is_text:
            raise ConfigError(
                f"task.inputs={task.inputs} is text, but model.source=python has no tokenizer; give "
                "tensors (.safetensors with the names of forward's arguments, or .npy)"
            )

    @override
    def skeleton(self, component: str, config: dict[str, Any]) -> nn.Module:
        """Build the network by the factory. Raises ConfigError if it builds nothing."""
        name = str(self.config.factory)
        factory = import_factory(name, self.config.folder)
        arguments = _arguments(name, factory, config, self.config.arguments or {})
        try:
            network = factory(**arguments)
        except Exception as error:
            raise ConfigError(_raised(name, arguments, error)) from error
        from torch import nn

        if not isinstance(network, nn.Module):
            raise ConfigError(f"model.factory={name} returned {_kind(network)}, no torch.nn.Module; return the network")
        return network


def split_name(name: str | None) -> tuple[str, str]:
    """(module, function) of 'package.module:function'. Raises ConfigError."""
    module, colon, function = (name or "").partition(":")
    parts = [*module.split("."), *function.split(".")]
    if not colon or module.endswith(".py") or not all(map(str.isidentifier, parts)):
        raise ConfigError(
            f"model.factory={name or 'null'} must name what builds the network, as package.module:function"
            f"{as_module_name(name or '')} (a class is a function, too)"
        )
    return module, function


def find_module(name: str, folder: str | None = None) -> ModuleSpec:
    """Find a module's file without importing anything. folder: looked into first, null for the current directory.

    Raises: ConfigError if it is nowhere.
    """
    first = _first_folder(folder)
    path: list[str] | None = [first, *sys.path]
    parts = name.split(".")
    spec = None
    for count in range(1, len(parts) + 1):
        spec = PathFinder.find_spec(".".join(parts[:count]), path)
        if spec is None:
            start = f"model.folder={folder}" if folder is not None else f"the current directory ({first})"
            inside = f"'{'.'.join(parts[: count - 1])}'" if count > 1 else start
            found = [*_modules_in(path[:1] if count == 1 and path else path or [])]
            raise ConfigError(
                f"model.factory: there is no module '{'.'.join(parts[:count])}'{did_you_mean(parts[count - 1], found)} "
                f"in {inside}{', and none is installed' if count == 1 else ''}; start from the folder that it is in, "
                "or name that with model.folder"
            )
        path = list(spec.submodule_search_locations or [])
    assert spec is not None  # a name has a part
    return spec


def folder_of(name: str) -> str | None:
    """Return the folder in which the way this program was started finds a module; None if it is installed."""
    top = name.partition(".")[0]
    places = [str(Path.cwd()), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return next((place for place in places if PathFinder.find_spec(top, [place]) is not None), None)


def _first_folder(folder: str | None) -> str:
    return str(Path(folder).expanduser().absolute() if folder is not None else Path.cwd())


def _modules_in(folders: list[str]) -> Iterator[str]:
    for folder in folders:
        yield from (path.stem for path in Path(folder).glob("*") if path.suffix == ".py" or path.is_dir())


def defined_names(spec: ModuleSpec) -> set[str] | None:
    """Return the names that a module binds at its top level; None if that cannot be read from its text."""
    text = parsed(spec)
    if text is None:
        return None
    names: set[str] = set()
    for node in text.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Tuple | ast.List) for target in targets):
                return None
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
        elif not isinstance(node, ast.Expr):
            return None  # an if, a try: it may bind anything
    return None if "*" in names or "__getattr__" in names else names


def import_factory(name: str, folder: str | None = None) -> Callable[..., Any]:
    """Return the function that `package.module:function` names. Raises ConfigError."""
    module_name, attribute = split_name(name)
    found = find_module(module_name, folder)
    if (first := _first_folder(folder)) not in sys.path:
        sys.path.insert(0, first)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ConfigError(f"model.factory={name}: importing '{module_name}' failed: {_where(error)}") from error
    origin = getattr(module.__spec__, "origin", None)
    if origin is None or found.origin is None or not os.path.samefile(origin, found.origin):
        raise ConfigError(
            f"model.factory={name}: '{found.origin}' cannot be imported as '{module_name}', which is '{origin}' here; "
            "give your module another name"
        )
    factory = getattr(module, attribute, None)
    if not callable(factory):
        known = [name for name, value in vars(module).items() if callable(value)]
        what = "defines no" if factory is None else f"has {_kind(factory)} as"
        raise ConfigError(
            f"model.factory={name}: '{module_name}' {what} {attribute!r}{did_you_mean(attribute, known)}; name a "
            "function that returns the network, or its class"
        )
    return factory


def _arguments(
    name: str, factory: Callable[..., Any], config: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the factory's arguments. Raises ConfigError for an argument that it does not take, or lacks."""
    fields = {key: value for key, value in config.items() if key not in NOT_THE_NETWORKS and not key.startswith("_")}
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):  # written in C
        return dict(given)
    takes_any = any(item.kind is item.VAR_KEYWORD for item in parameters.values())
    named = {
        key: item for key, item in parameters.items() if item.kind in (item.POSITIONAL_OR_KEYWORD, item.KEYWORD_ONLY)
    }
    for key in given:
        if key not in named and not takes_any:
            takes = f"it takes {choices(named)}" if named else "it takes none"
            raise ConfigError(f"model.arguments.{key}{did_you_mean(key, named)} is no argument of {name}; {takes}")
    if list(named) == ["config"] and "config" not in given and "config" not in fields:
        return {"config": dict(config)}
    arguments = {key: value for key, value in fields.items() if key in named or takes_any} | dict(given)
    lacking = [key for key, item in named.items() if item.default is item.empty and key not in arguments]
    if lacking:
        raise ConfigError(
            f"model.factory={name} needs {choices(lacking)}, which neither config.json beside the checkpoint nor "
            f"model.arguments has; set model.arguments='{{{lacking[0]}: …}}'"
        )
    return arguments


def _without_config(path: Path) -> Path:
    """Return the one file of a folder that has no config.json, which a network without settings does not need."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() and not (path / "config.json").exists() else []
    return files[0] if len(files) == 1 else path


def _raised(name: str, arguments: Mapping[str, Any], error: Exception) -> str:
    called = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    check = "check model.arguments; " if arguments and isinstance(error, TypeError | ValueError) else ""
    return (
        f"model.factory={name} failed, called with ({called[:200]}): {_where(error)}; {check}it is to build the "
        "network alone: its parameters have no memory yet (the meta device), and its weights are loaded afterwards"
    )


def _where(error: Exception) -> str:
    """Return an exception and the line of the user's that it comes from."""
    frames = traceback.extract_tb(error.__traceback__)
    others = (str(PACKAGE), "site-packages", "importlib")  # this program, which watches the factory; libraries
    own = [frame for frame in frames if not any(other in frame.filename for other in others)]
    place = f" ({own[-1].filename}:{own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {error}{place}"


def _kind(value: object) -> str:
    return f"{'an' if type(value).__name__[0] in 'aeiou' else 'a'} {type(value).__name__}"
