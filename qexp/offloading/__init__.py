"""Offloading: where weights rest, in which groups they travel to the compute device, and how.

The package can be called: `qexp.offload(model, "leaf")` is `qexp.api.models.offload`, whose name it would hide
otherwise.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class CallablePackage(ModuleType):
    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        from qexp.api.models import offload

        return offload(*arguments, **settings)


sys.modules[__name__].__class__ = CallablePackage
