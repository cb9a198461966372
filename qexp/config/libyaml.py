"""OmegaConf's YAML files, read by libyaml: the same values, in a tenth of the time.

OmegaConf derives its loader from PyYAML's parser in Python. Hydra reads a dozen files for each experiment of a sweep by
it. PyYAML's wheels have the parser in C as well, to which the rules of OmegaConf's loader are applied here: what is a
number, no dates, no key twice.

A text that libyaml refuses is read again by the parser in Python, whose message shows the line.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import yaml
from omegaconf import _utils


def read_by_libyaml() -> None:
    """Have OmegaConf parse in C, where PyYAML can."""
    if hasattr(yaml, "CSafeLoader"):
        _utils.get_yaml_loader = libyaml_loader


@cache
def libyaml_loader() -> Any:
    """Return OmegaConf's loader with the parser of libyaml."""
    rules, parser = _PYTHON_LOADER(), yaml._yaml.CParser

    class InC(parser, rules):  # type: ignore[misc, valid-type]
        def __init__(self, stream: Any) -> None:
            parser.__init__(self, stream)
            yaml.constructor.SafeConstructor.__init__(self)
            yaml.resolver.Resolver.__init__(self)

    class Loader:
        def __init__(self, stream: Any) -> None:
            self.text = stream if isinstance(stream, str | bytes) else stream.read()
            self.name = getattr(stream, "name", None)

        def get_single_data(self) -> Any:
            try:
                return InC(self.text).get_single_data()
            except yaml.YAMLError:
                loader = rules(self.text)
                loader.name = self.name or loader.name  # for its message
                return loader.get_single_data()

        def dispose(self) -> None:
            """Called by yaml.load; there is nothing to release."""

    return Loader


_PYTHON_LOADER = _utils.get_yaml_loader
