"""Generate samples from fixed seeds, so that a candidate and its reference start from the same noise.

What is generated depends on the model: images here, text in `text.py`. What is recorded after a step (state, memory)
is outside the time of the step, but inside `time/total_seconds`.
"""

from __future__ import annotations

from qexp.config.generate import GenerateConfig
from qexp.tasks.context import RunContext
from qexp.tasks.recorder import TaskResult

Config = GenerateConfig


def run_generate(context: RunContext) -> TaskResult:
    """Generate once.

    Outputs: those of the source, and trajectory [steps, ...] fp32, the state after each step. Rows: step (from 1),
    step_ms, host_gib, device_gib. Metrics: those of `Recorder.times`, and time/total_seconds.
    """
    import torch

    source, task = context.source, context.task
    recorder = context.recorder("generating", source.number_of_steps(context.models, task))
    recorder.begin()
    outputs = source.generate(context.models, task, seed=context.seed, device=context.device, on_step=recorder.on_step)
    times = recorder.times()
    return TaskResult({**outputs, "trajectory": torch.stack(recorder.states)}, recorder.rows, times)
