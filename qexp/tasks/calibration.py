"""Run samples of the task through models whose quantizer needs to see activations before they can answer.

Images begin from another seed than the task's own: what is measured afterwards is not what was calibrated on. Where
there are prompts, the samples are those of the first of them; a network that is called with inputs of the user's is
called with the first rows of these.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from qexp.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from qexp.tasks.context import RunContext

OTHER_SEEDS = 1 << 62  # image i has the noise of seed + i: far from all that are measured


def calibrate_models(context: RunContext) -> None:
    """Calibrate every model that asks for it with `calibration_samples` samples, all steps of them.

    Raises: ConfigError for a task that generates none.
    """
    from qexp.loading.quantized_model import registered_quantizer

    for model in context.models.values():
        quantizer = registered_quantizer(model)
        if quantizer is not None and quantizer.requires_calibration:
            count = quantizer.config.calibration_samples
            run_samples = _generate_samples if context.inputs is None else partial(_call_with_inputs, model)
            quantizer.calibrate(model, partial(run_samples, context, count))


def _generate_samples(context: RunContext, count: int) -> None:
    """Generate the first `count` samples. Raises ConfigError for a task that generates none."""
    if context.task.name != "generate":
        raise ConfigError(
            f"this backend is calibrated on samples of the task, and task={context.task.name} has none; use "
            "task=generate, or task=forward"
        )
    samples, seed = context.source.limit_samples(context.task, count), context.seed ^ OTHER_SEEDS
    context.source.generate(context.models, samples, seed=seed, device=context.device, on_step=lambda step, state: None)


def _call_with_inputs(model: nn.Module, context: RunContext, count: int) -> None:
    """Call a network with the first `count` rows of its inputs."""
    from qexp.tasks.forward import batches_of, call_network

    assert context.inputs is not None
    first = {name: tensor[:count] if tensor.dim() else tensor for name, tensor in context.inputs.items()}
    for batch in batches_of(first, context.task.batch_size):
        call_network(model, batch, context.device)
