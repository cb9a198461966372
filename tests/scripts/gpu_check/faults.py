"""`--setup tests.scripts.gpu_check.faults:install`: the fake device, and four faults that the checks must survive."""

import os
from pathlib import Path
from typing import Any

import torch

from gpu_checks import offloading, speed
from tests.fake_device import backend

RAISES, DIES, LEAVES = "block disk no stream", "leaf cpu pinned no stream", "block cpu pinned stream depth 2"

DIES_TIMED = "qexp leaf stream"

_left: list[torch.Tensor] = []


def install() -> None:
    backend.install()
    check, measure = offloading.Subject.check, speed.Race.measure

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

    def faulty_measure(race: speed.Race, name: str) -> Any:
        if name == DIES_TIMED:
            os._exit(9)
        return measure(race, name)

    offloading.Subject.check = faulty  # type: ignore[method-assign]
    speed.Race.measure = faulty_measure  # type: ignore[method-assign]
