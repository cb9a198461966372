"""Generate samples from fixed seeds, so that a candidate and its reference start from the same noise.

Each integration step is timed on its own, with the device synchronized at both ends; what is recorded after a step
(state, memory) is outside its time, but inside `time/total_seconds`.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qexp.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from qexp.models.base import ModelSource


@dataclass(frozen=True)
class GenerateConfig:
    """num_images: samples in all; num_inference_steps: integration steps; guidance_scale: 1 is without guidance."""

    name: str = "generate"
    num_images: int = 200
    num_inference_steps: int = 20
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.num_images < 1 or self.num_inference_steps < 1:
            raise ConfigError(
                f"task.num_images={self.num_images} and task.num_inference_steps={self.num_inference_steps} "
                "must be 1 or more"
            )
        if not math.isfinite(self.guidance_scale):
            raise ConfigError(f"task.guidance_scale={self.guidance_scale} must be a finite number; 1 is no guidance")


Config = GenerateConfig


@dataclass(frozen=True)
class TaskResult:
    """What a task leaves: tensors to save, the rows of memory.csv, and metrics by name."""

    outputs: dict[str, Tensor]
    rows: list[dict[str, float]]
    metrics: dict[str, float]


def run(
    source: ModelSource,
    models: dict[str, nn.Module],
    task: GenerateConfig,
    *,
    seed: int,
    device: torch.device,
    memory: Callable[[], tuple[float, float]],
) -> TaskResult:
    """Generate once; `memory()` gives (host_gib, device_gib) after each step.

    Outputs: images, labels and trajectory [steps, n, ...] fp32, the state after each step. Rows: step (from 1),
    step_ms, host_gib, device_gib. Metrics: time/step_ms (median) and time/total_seconds.
    """
    import torch

    recorder = _Recorder(task.num_inference_steps, device, memory)
    started = recorder.begin()
    outputs = source.generate(models, task, seed=seed, device=device, on_step=recorder.on_step)
    total_seconds = time.perf_counter() - started
    times_ms = [row["step_ms"] for row in recorder.rows]
    return TaskResult(
        outputs={**outputs, "trajectory": torch.stack(recorder.states)},
        rows=recorder.rows,
        metrics={"time/step_ms": statistics.median(times_ms), "time/total_seconds": total_seconds},
    )


@dataclass
class _Recorder:
    """Collects what `on_step` reports, and shows progress on stderr."""

    steps: int
    device: torch.device
    memory: Callable[[], tuple[float, float]]
    rows: list[dict[str, float]] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
    step_started: float = 0.0

    def begin(self) -> float:
        """Wait for earlier work of the device and start the clock of step 1."""
        self._synchronize()
        self.step_started = time.perf_counter()
        return self.step_started

    def on_step(self, step: int, state: Tensor) -> None:
        import torch

        self._synchronize()
        step_ms = 1000 * (time.perf_counter() - self.step_started)
        host_gib, device_gib = self.memory()
        self.rows.append({"step": step, "step_ms": step_ms, "host_gib": host_gib, "device_gib": device_gib})
        self.states.append(state.detach().to("cpu", torch.float32, copy=True))
        self._show(step, step_ms)
        self.step_started = time.perf_counter()

    def _synchronize(self) -> None:
        if self.device.type != "cpu":
            import torch

            torch.accelerator.synchronize(self.device)

    def _show(self, step: int, step_ms: float) -> None:
        """Rewrite one line on a terminal; elsewhere write a line at every quarter."""
        line = f"generate: step {step}/{self.steps}, {step_ms:.0f} ms a step"
        if sys.stderr.isatty():
            print(f"\r{line}\x1b[K", end="\n" if step == self.steps else "", file=sys.stderr, flush=True)
        elif step * 4 // self.steps > (step - 1) * 4 // self.steps:
            print(line, file=sys.stderr, flush=True)
