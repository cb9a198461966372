"""Call a network once on inputs of the user's, batch by batch, and keep every floating-point tensor that it returns.

Outputs are known by dotted names: `output` of a bare tensor, keys of mappings and dataclasses, numbers of lists and
tuples (`hidden_states.3`). Batches are put together again along the first dimension. What stands behind the end of a
text is nobody's answer: it is zero in what is saved. Inputs: `forward_inputs.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

from qexp.errors import ConfigError, QexpError, choices, did_you_mean
from qexp.tasks.input_files import ForwardConfig
from qexp.tasks.recorder import TaskResult

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from qexp.tasks.context import RunContext


Config = ForwardConfig


def component_of(task: ForwardConfig, components: Iterable[str]) -> str:
    """Return the component that is called.

    Raises ConfigError if none is named and there are several, or it is not there.
    """
    names = list(components)
    if task.component is None and len(names) == 1:
        return names[0]
    if task.component not in names:
        raise ConfigError(
            f"task.component={task.component or 'null'}{did_you_mean(task.component, names)} is no component of this "
            f"model; use {choices(names)}"
        )
    return task.component


def run_forward(context: RunContext) -> TaskResult:
    """Call the one network that is loaded on the inputs; a step is a batch.

    Outputs: by their names, in the dtypes that they come in. Metrics: those of `Recorder.times` (a
    step is a batch), time/total_seconds.
    """
    (model,), inputs, task = context.models.values(), context.inputs, context.task
    assert inputs is not None  # read when the run was planned
    batches = list(batches_of(inputs, task.batch_size))
    parts: dict[str, list[Tensor]] = {}
    recorder = context.recorder("calling the network", len(batches))
    recorder.begin()
    for step, batch in enumerate(batches, start=1):
        for name, tensor in call_network(model, batch, context.device).items():
            parts.setdefault(name, []).append(tensor)
        recorder.on_step(step, None)
    times = recorder.times()
    outputs = _joined(parts, batches)
    if task.is_text and "attention_mask" in inputs:
        outputs = {name: without_padding(tensor, inputs["attention_mask"]) for name, tensor in outputs.items()}
    return TaskResult(outputs, recorder.rows, times)


def call_network(model: nn.Module, batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Call the network on one batch; its output is moved to the CPU. Raises ConfigError if it takes no such inputs."""
    import torch

    given = {name: tensor.to(device) for name, tensor in batch.items()}
    try:
        with torch.no_grad():
            returned = model(**given)
    except (QexpError, torch.OutOfMemoryError):  # says itself what is wrong
        raise
    except (TypeError, IndexError, ValueError, AttributeError, RuntimeError) as error:
        shapes = ", ".join(f"{name} {str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for name, t in batch.items())
        raise ConfigError(
            f"{type(model).__name__} cannot be called with the tensors of task.inputs ({shapes}): "
            f"{type(error).__name__}: {error}; check their shapes and names"
        ) from error
    found = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors_of(returned)}
    if not found:
        raise ConfigError(
            f"{type(model).__name__} returns a {type(returned).__name__} without floating-point tensors: there is "
            "nothing to compare; use task=roundtrip"
        )
    return found


def tensors_of(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """(dotted name, tensor) of every floating-point tensor in what a network returns."""
    import torch

    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield name or "output", value
        return
    inside: Mapping[Any, Any] = {}
    if isinstance(value, Mapping):
        inside = value
    elif is_dataclass(value):
        inside = {item.name: getattr(value, item.name) for item in fields(value)}
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        inside = dict(zip(value._fields, value, strict=True))
    elif isinstance(value, list | tuple):
        inside = dict(enumerate(value))
    for key, item in inside.items():
        yield from tensors_of(item, f"{name}.{key}" if name else str(key))


def batches_of(inputs: Mapping[str, Tensor], size: int) -> Iterator[dict[str, Tensor]]:
    """Yield the inputs cut along their first dimension; those without one go with every batch."""
    for start in range(0, max(row_count(inputs), 1), size):
        yield {name: tensor[start : start + size] if tensor.dim() else tensor for name, tensor in inputs.items()}


def without_padding(output: Tensor, mask: Tensor) -> Tensor:
    """An output with zeros where its text has ended; one that does not go by tokens, [rows, longest(, n)], as it is."""
    if output.shape[:2] != mask.shape or output.dim() > 3:  # attentions are [rows, heads, longest, longest]
        return output
    return output.masked_fill(mask.view(*mask.shape, *[1] * (output.dim() - 2)) == 0, 0)


def row_count(inputs: Mapping[str, Tensor]) -> int:
    return next((len(tensor) for tensor in inputs.values() if tensor.dim()), 0)


def _joined(parts: Mapping[str, list[Tensor]], batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return each output's batches behind one another. Raises ConfigError for an output that does not go by rows."""
    import torch

    counts = [row_count(batch) for batch in batches]
    joined: dict[str, Tensor] = {}
    for name, tensors in parts.items():
        if len(batches) == 1:
            joined[name] = tensors[0]
            continue
        by_rows = [len(tensor) if tensor.dim() else None for tensor in tensors] == counts
        if not by_rows or len({tensor.shape[1:] for tensor in tensors}) > 1:
            shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors[:3])
            raise ConfigError(
                f"the output {name!r} has no row for each of the inputs' (batches give {shapes}), so batches cannot be "
                f"put together; set task.batch_size={sum(counts)} or more"
            )
        joined[name] = torch.cat(tensors)
    return joined
