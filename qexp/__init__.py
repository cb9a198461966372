"""qexp: quantize while loading, offload without changing a bit, and compare.

The functions for notebooks and other programs are those of `qexp.api`; what they do is described there.
Importing this package imports nothing else: torch comes with the first of them that is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from qexp.version import __version__ as __version__

if TYPE_CHECKING:
    from qexp.api.models import backends, load, memory_footprint, offload, remove_offload, save
    from qexp.api.pipelines import load_pipeline

__all__ = ["backends", "load", "load_pipeline", "memory_footprint", "offload", "remove_offload", "save"]


def __getattr__(name: str) -> Any:
    if name == "load_pipeline":
        return importlib.import_module("qexp.api.pipelines").load_pipeline
    if name in __all__:
        return getattr(importlib.import_module("qexp.api.models"), name)
    raise AttributeError(f"module 'qexp' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
