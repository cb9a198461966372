"""What a task gets, made of as little as it needs."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from qexp.tasks.context import RunContext


@dataclass(frozen=True)
class FixedMemory(RunContext):
    """A context that says what it is told of memory."""

    memory: Callable[[], tuple[float | None, float]] = lambda: (0.0, 0.0)

    def memory_gib(self) -> tuple[float | None, float]:
        return self.memory()


def context_of(task: Any, *, source: Any = None, device: str = "cpu", seed: int = 0, **fields: Any) -> RunContext:
    config: Any = SimpleNamespace(task=task, seed=seed)
    return FixedMemory(config, source, torch.device(device), **{"folder": Path(), "requests": {}, **fields})
