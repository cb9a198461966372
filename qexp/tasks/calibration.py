"""Run samples of the task through models whose quantizer needs to see activations before they can answer.

Images begin from another seed than the task's own: what is measured afterwards is not what was calibrated on. Where
there are prompts, the samples are those of the first of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qexp.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from qexp.tasks.generate import GenerateConfig


def calibrate(source: Any, models: Mapping[str, nn.Module], task: Any, *, seed: int, device: torch.device) -> None:
    """Calibrate every model that asks for it with `calibration_samples` samples, all steps of them.

    Raises: ConfigError for a task that generates none.
    """
    from qexp.loading.registration import registered_quantizer

    for model in models.values():
        quantizer = registered_quantizer(model)
        if quantizer is None or not quantizer.requires_calibration:
            continue
        samples = samples_of(source, task, quantizer.config.calibration_samples)

        def run(samples: GenerateConfig = samples) -> None:
            source.generate(dict(models), samples, seed=seed + 1, device=device, on_step=lambda step, state: None)

        quantizer.calibrate(model, run)


def samples_of(source: Any, task: Any, count: int) -> GenerateConfig:
    """The task with `count` samples."""
    if task.name != "generate":
        raise ConfigError(
            f"this backend is calibrated on samples of the task, and task={task.name} generates none; use task=generate"
        )
    if hasattr(source, "prompts"):
        samples: GenerateConfig = replace(task, prompt=tuple(source.prompts(task)[:count]))
        return samples
    return replace(task, num_images=count)
