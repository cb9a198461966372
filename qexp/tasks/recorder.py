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
from qexp.system.stages import Stage, show_stage

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
    """Collects what `on_step` reports, and shows how far it is.

    verb: what a step does, such as 'generating'. steps: None if their number is not known.
    memory: (host, device) in GiB, None where the host's is not the experiment's own, and then in no row.
    """

    verb: str
    steps: int | None
    device: torch.device
    memory: Callable[[], tuple[float | None, float]]
    rows: list[dict[str, float]] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
    step_started: float = 0.0
    started: float = 0.0

    def begin(self) -> None:
        """Wait for earlier work of the device and start the clock of step 1."""
        show_stage(self._stage(0, ""))
        self._synchronize()
        self.started = self.step_started = time.perf_counter()

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

    def times(self, tokens: int | None = None) -> dict[str, float | None]:
        """Return the `time/` metrics of the steps so far, and of all since `begin`.

        Of the steps, the first one, which warms up, is one of its own. tokens: how many were made or read meanwhile.
        """
        seconds = time.perf_counter() - self.started
        pace = {} if tokens is None else {"time/tokens_per_second": tokens / seconds}
        return {**step_times([row["step_ms"] for row in self.rows]), "time/total_seconds": seconds, **pace}

    def _synchronize(self) -> None:
        if self.device.type != "cpu":
            import torch

            torch.accelerator.synchronize(self.device)

    def _show(self, step: int, step_ms: float) -> None:
        """Hand on the stage; without a display rewrite one line on a terminal, elsewhere write a line at every quarter,
        or at powers of two."""
        line = f"{self._stage(step, '').describe()}, {step_ms:.0f} ms a step"
        is_terminal = sys.stderr.isatty()
        is_due = step * 4 // self.steps > (step - 1) * 4 // self.steps if self.steps else step & (step - 1) == 0
        if show_stage(self._stage(step, line if is_due else "")):
            return
        if is_terminal:
            say(f"\r{line}\x1b[K", end="\n" if step == self.steps else "")
        elif is_due:
            say(line)

    def _stage(self, step: int, line: str) -> Stage:
        seconds = time.perf_counter() - self.started if step else 0.0
        return Stage(f"{self.verb} step {{}}", step, self.steps, seconds=seconds, line=line)
