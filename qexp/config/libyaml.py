"""OmegaConf's YAML files, read by libyaml: the same values, in a tenth of the time.

OmegaConf derives its loader from PyYAML's parser in Python. Hydra reads a dozen files for each experiment of a sweep by
it. PyYAML's wheels have the parser in C as well, to which the rules of OmegaConf's loader are applied here: what is a
number, no dates, no key twice.
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
    """OmegaConf's loader with the parser of libyaml."""
    rules, parser = _PYTHON_LOADER(), yaml._yaml.CParser

    class Loader(parser, rules):  # type: ignore[misc, valid-type]
        def __init__(self, stream: Any) -> None:
            parser.__init__(self, stream)
            yaml.constructor.SafeConstructor.__init__(self)
            yaml.resolver.Resolver.__init__(self)

    return Loader


_PYTHON_LOADER = _utils.get_yaml_loader
