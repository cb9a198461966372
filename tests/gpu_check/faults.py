"""`--setup tests.gpu_check.faults:install`: the fake device, and three faults that the checks must survive."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from gpu_checks import offloading
from tests.fake_device import backend

RAISES, DIES, LEAVES = "block disk no stream", "leaf cpu pinned no stream", "block cpu pinned stream depth 2"

_left: list[torch.Tensor] = []


def install() -> None:
    backend.install()
    check = offloading.Subject.check

    def faulty(subject: offloading.Subject, way: offloading.Way, store: Path, **options: Any) -> Any:
        if way.name == DIES:
            os._exit(9)
        if way.name == RAISES:
            raise RuntimeError("broken on purpose")
        if way.name == LEAVES:
            _left.append(torch.empty(1 << 20, dtype=torch.uint8, device=subject.accelerator.device))
        try:
            return check(subject, way, store, **options)
        finally:
            _left.clear()

    offloading.Subject.check = faulty  # type: ignore[method-assign]
