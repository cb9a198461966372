"""Run samples of the task through models whose quantizer needs to see activations before they can answer.

Images begin from another seed than the task's own: what is measured afterwards is not what was calibrated on. Where
there are prompts, the samples are those of the first of them; a network that is called with inputs of the user's is
called with the first rows of these.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from qexp.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from qexp.config.generate import GenerateConfig
    from qexp.models.base import ModelSource

OTHER_SEEDS = 1 << 62  # image i has the noise of seed + i: far from all that are measured


def calibrate(
    source: ModelSource,
    models: Mapping[str, nn.Module],
    task: Any,
    *,
    seed: int,
    device: torch.device,
    inputs: Mapping[str, Tensor] | None = None,
) -> None:
    """Calibrate every model that asks for it with `calibration_samples` samples, all steps of them.

    inputs: of `task=forward`.
    Raises: ConfigError for a task that generates none.
    """
    from qexp.loading.quantized_model import registered_quantizer

    for model in models.values():
        quantizer = registered_quantizer(model)
        if quantizer is None or not quantizer.requires_calibration:
            continue
        count = quantizer.config.calibration_samples
        if inputs is not None:
            quantizer.calibrate(model, partial(_call, model, inputs, count, task.batch_size, device))
            continue
        _check_samples(task)
        samples = source.limit_samples(task, count)

        def run(samples: GenerateConfig = samples) -> None:
            source.generate(
                dict(models), samples, seed=seed ^ OTHER_SEEDS, device=device, on_step=lambda step, state: None
            )

        quantizer.calibrate(model, run)


def _call(model: nn.Module, inputs: Mapping[str, Tensor], count: int, batch_size: int, device: torch.device) -> None:
    """Call a network with the first `count` rows of its inputs."""
    from qexp.tasks.forward import answers, batches_of

    first = {name: tensor[:count] if tensor.dim() else tensor for name, tensor in inputs.items()}
    for batch in batches_of(first, batch_size):
        answers(model, batch, device)


def _check_samples(task: Any) -> None:
    """Raises ConfigError for a task that generates no samples."""
    if task.name != "generate":
        raise ConfigError(
            f"this backend is calibrated on samples of the task, and task={task.name} has none; use task=generate, or "
            "task=forward"
        )
