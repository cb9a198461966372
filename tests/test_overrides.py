"""Model sources and quantizers override what their base classes have, and misspell none of it.

mypy refuses a method that overrides without `@override`, and one so marked that overrides nothing. What it cannot see
is a misspelt method without a mark: so public names that no base class has are listed here.
"""

from typing import Any

import pytest

from qexp.config.plugins import plugin_module, plugin_names
from qexp.models.base import ModelSource
from qexp.models.folder import FolderSource
from qexp.quantizers.base import Quantizer

OWN = {  # public names of a class that are its own
    "backend/gguf": {"wrap"},
    "backend/qexp_packed": {"inner_shapes", "parameters"},
    "model/causal_lm": {"folder", "network_class", "padding_side", "tokenizer"},
    "model/diffusers": {"folder", "pipeline", "prompts"},
}


def undeclared(kind: type, base: type, own: set[str]) -> set[str]:
    """Public names that a class defines and no class above it has."""
    above = {name for parent in kind.__mro__[1:] for name in vars(parent)} | set(base.__annotations__)
    return {name for name in vars(kind) if not name.startswith("_")} - above - own


def unmarked(kind: type) -> set[str]:
    """Methods that override one of a class above without saying so."""
    found = set()
    for name, value in vars(kind).items():
        function = getattr(value, "fget", None) or getattr(value, "func", None) or getattr(value, "__func__", value)
        overrides = any(name in vars(parent) for parent in kind.__mro__[1:-1])
        if callable(function) and overrides and not name.startswith("__"):
            found |= set() if getattr(function, "__override__", False) else {name}
    return found


def classes() -> list[str]:
    return [f"{group}/{name}" for group in ("model", "backend") for name in plugin_names(group)]


@pytest.mark.parametrize("name", classes())
def test_every_public_method_overrides_or_is_declared(name: str) -> None:
    group, _, plugin = name.partition("/")
    module = plugin_module(group, plugin)
    kind, base = (module.Source, ModelSource) if group == "model" else (module.Quantizer, Quantizer)
    assert issubclass(kind, base)
    assert not undeclared(kind, base, OWN.get(name, set())) and not unmarked(kind)


def test_a_misspelt_or_unmarked_method_is_found() -> None:
    class Misspelt(FolderSource):
        def block_list(self, model: Any) -> list[str]:
            return []

        def carried_files(self) -> tuple[str, ...]:
            return ()

    assert undeclared(Misspelt, ModelSource, set()) == {"block_list"} and unmarked(Misspelt) == {"carried_files"}


def test_a_source_without_its_two_methods_is_refused() -> None:
    class Empty(ModelSource):
        pass

    kind: Any = Empty
    with pytest.raises(TypeError, match=r"checkpoints.*skeleton"):
        kind(None)
