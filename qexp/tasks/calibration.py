"""Run samples of the task through models whose quantizer needs to see activations before they can answer.

The samples begin from another seed than the task's own: what is measured afterwards is not what was calibrated on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

    from qexp.models.base import ModelSource
    from qexp.tasks.generate import GenerateConfig


def calibrate(
    source: ModelSource, models: Mapping[str, nn.Module], task: GenerateConfig, *, seed: int, device: torch.device
) -> None:
    """Calibrate every model that asks for it with `calibration_samples` samples, all steps of them."""
    from qexp.loading.registration import registered_quantizer

    for model in models.values():
        quantizer = registered_quantizer(model)
        if quantizer is None or not quantizer.requires_calibration:
            continue
        samples = replace(task, num_images=quantizer.config.calibration_samples)

        def run(samples: GenerateConfig = samples) -> None:
            source.generate(dict(models), samples, seed=seed + 1, device=device, on_step=lambda step, state: None)

        quantizer.calibrate(model, run)
