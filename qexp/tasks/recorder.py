"""What every task that runs a model leaves, and the clock that its steps report to.

Each step is timed on its own, with the device synchronized at both ends; what is recorded after a step (state, memory)
is outside its time.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qexp.metrics.timing import step_times
from qexp.system.screen import say

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class TaskResult:
    """What a task leaves: tensors to save, the rows of memory.csv, and metrics by name."""

    outputs: dict[str, Tensor]
    rows: list[dict[str, float]]
    metrics: dict[str, float | None]


@dataclass
class Recorder:
    """Collects what `on_step` reports, and shows progress on stderr.

    steps: None if their number is not known; memory: (host, device) in GiB, None where the host's is not the
    experiment's own, and then in no row.
    """

    title: str
    steps: int | None
    device: torch.device
    memory: Callable[[], tuple[float | None, float]]
    rows: list[dict[str, float]] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
    step_started: float = 0.0

    def begin(self) -> float:
        """Wait for earlier work of the device and start the clock of step 1."""
        self._synchronize()
        self.step_started = time.perf_counter()
        return self.step_started

    def on_step(self, step: int, state: Tensor | None) -> None:
        import torch

        self._synchronize()
        if self.steps is not None and step > self.steps:
            self.steps = None  # a source takes more than it said: better no total than "10/8"
        step_ms = 1000 * (time.perf_counter() - self.step_started)
        host_gib, device_gib = self.memory()
        host = {} if host_gib is None else {"host_gib": host_gib}
        self.rows.append({"step": step, "step_ms": step_ms, **host, "device_gib": device_gib})
        if state is not None:
            self.states.append(state.detach().to("cpu", torch.float32, copy=True))
        self._show(step, step_ms)
        self.step_started = time.perf_counter()

    def step_times(self) -> dict[str, float | None]:
        """Return the `time/` metrics of the steps so far; the first one, which warms up, is one of its own."""
        return step_times([row["step_ms"] for row in self.rows])

    def _synchronize(self) -> None:
        if self.device.type != "cpu":
            import torch

            torch.accelerator.synchronize(self.device)

    def _show(self, step: int, step_ms: float) -> None:
        """Rewrite one line on a terminal; elsewhere write a line at every quarter, or at powers of two."""
        last = step == self.steps
        line = f"{self.title}: step {step}{f'/{self.steps}' if self.steps else ''}, {step_ms:.0f} ms a step"
        if sys.stderr.isatty():
            say(f"\r{line}\x1b[K", end="\n" if last else "")
        elif step * 4 // self.steps > (step - 1) * 4 // self.steps if self.steps else step & (step - 1) == 0:
            say(line)
