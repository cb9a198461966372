"""One experiment as its task sees it: settings, model, device and folder, handed along as one object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qexp.system.memory import GIB, device_memory, host_memory
from qexp.tasks.recorder import Recorder

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from qexp.config.schema import RunConfig
    from qexp.loading.component import LoadRequest
    from qexp.models.base import ModelSource


@dataclass(frozen=True)
class RunContext:
    """source: of the model; folder: of the run; requests: what is loaded, by component, with opened checkpoints;
    models: by component, skeletons until they are loaded; inputs: of `task=forward`, by the names of the network's
    arguments."""

    config: RunConfig
    source: ModelSource
    device: torch.device
    folder: Path
    requests: Mapping[str, LoadRequest]
    models: dict[str, nn.Module] = field(default_factory=dict)
    inputs: Mapping[str, Tensor] | None = None

    @property
    def task(self) -> Any:
        return self.config.task

    @property
    def seed(self) -> int:
        return self.config.seed

    def memory_gib(self) -> tuple[float | None, float]:
        """(resident host memory, allocated device memory).

        With isolation=inline the process holds more than this experiment: None, as it is null in result.json.
        """
        is_shared = self.config.isolation.mode == "inline"
        return None if is_shared else host_memory().total_bytes / GIB, device_memory(self.device) / GIB

    def recorder(self, verb: str, steps: int | None) -> Recorder:
        """Return the clock of a task with so many steps; None if their number is not known. verb: what a step does."""
        return Recorder(verb, steps, self.device, self.memory_gib)
