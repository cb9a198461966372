"""The calls of a network that its sensitivity is measured on, each with what an error of its output counts.

Models that generate by steps: the states of the unquantized model's own trajectory, at steps spread over the schedule.
What an error at a step does to the end is measured: a small random change of the network's output there, and the
samples generated to the end. The change of the final latents over it, both squared, is the weight of that step. So a
score is the mean squared error of the final latents, if errors of different steps are independent.

Models of text: windows of a text; a score is the mean KL divergence of the next token from the unquantized model's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from qexp.config.text_windows import window_and_stride
from qexp.errors import ConfigError
from qexp.tasks.forward import tensors_of

if TYPE_CHECKING:
    from qexp.models.base import TextSource
    from qexp.tasks.context import RunContext

IMAGES, WINDOWS, WINDOW = 16, 32, 64  # samples, and tokens of a window, where none are asked for
CHANGE = 0.01  # of an output, relative to its root mean square, by which the effect of a step is measured
LOGITS = 1 << 26  # values of one batch
INPUTS = 1 << 20  # values of calls that are put together


@dataclass(frozen=True)
class Batch:
    """One call of the network. weights: of each row of its output, [rows], by which its error counts."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    weights: Tensor


@dataclass(frozen=True)
class Calibration:
    """batches: component -> its calls; error, unit: what scores are, see `table.py`; samples: how many there are."""

    batches: Mapping[str, Sequence[Batch]]
    error: str
    unit: str
    samples: int


def first_tensor(returned: Any) -> Tensor:
    """Return the output of a network: the first floating-point tensor in what it returns."""
    found = next(tensors_of(returned), None)
    if found is None:
        raise ConfigError(f"the network returns a {type(returned).__name__} without floating-point tensors; no score")
    return found[1]


def read_text(context: RunContext) -> Calibration:
    """Return windows of the text, cut one behind the other."""
    model: Any = context.models["model"]
    task, source = context.task, cast("TextSource", context.source)
    begin = source.begin_token
    config = model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    window = task.window or min(WINDOW, longest or WINDOW)
    size, _ = window_and_stride(longest, window, None, has_begin=begin is not None)
    tokens = source.encode(source.text(task.text))[: (task.samples or WINDOWS) * size]
    if len(tokens) < (1 if begin is not None else 2):
        raise ConfigError(f"task.text has {len(tokens)} tokens, too few to predict any; give a longer text")
    size = min(size, len(tokens))
    windows = tokens[: len(tokens) // size * size].view(-1, size)
    if begin is not None:
        windows = torch.nn.functional.pad(windows, (1, 0), value=begin)
    inputs = windows[:, :-1].to(context.device)
    rows = max(1, min(LOGITS // (inputs.shape[1] * config.vocab_size), task.batch_size or len(inputs)))
    weight = 1 / inputs.numel()
    batches = [
        Batch((part,), {"use_cache": False}, torch.full((len(part),), weight, device=context.device))
        for part in inputs.split(rows)
    ]
    return Calibration({"model": batches}, "kl", "nats of a predicted token", len(inputs))


@dataclass
class _Watch:
    """Counts the calls of the networks by the step of their trajectory, and can keep or change some of them.

    length: steps of a trajectory; kept: steps whose calls are kept; changed: the place, (component, step, number within
    the step), whose output is changed.
    """

    length: int
    kept: frozenset[int] = frozenset()
    changed: tuple[str, int, int] | None = None
    random: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))
    steps: int = 0
    calls: dict[tuple[str, int, int], list[tuple[Any, Any, Tensor]]] = field(default_factory=dict)
    change: float = 0.0  # squared, of all that was changed
    final: Tensor | None = None
    _numbers: dict[str, int] = field(default_factory=dict)

    def on_step(self, step: int, state: Tensor | None) -> None:
        self.steps, self._numbers, self.final = step, {}, state

    def after_call(self, component: str, args: Any, kwargs: Any, returned: Any) -> None:
        number = self._numbers.get(component, 0)
        self._numbers[component] = number + 1
        step = self.steps % self.length
        if step in self.kept:
            copied = tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), (args, kwargs))
            self.calls.setdefault((component, step, number), []).append((*copied, first_tensor(returned).clone()))
        if self.changed == (component, step, number):
            output = first_tensor(returned)
            noise = torch.randn(output.shape, generator=self.random).to(output)
            noise *= CHANGE * output.square().mean().sqrt()
            self.change += float(noise.double().square().sum())
            output.add_(noise)


def read_trajectory(context: RunContext, components: Sequence[str]) -> Calibration:
    """Return calls at steps of the trajectory. Raises ConfigError for a component that does not reach the samples."""
    task, source = context.task, context.source
    sampling = source.limit_samples(task.sampling(), task.samples or IMAGES)
    length = source.number_of_steps(context.models, source.limit_samples(sampling, 1))
    if length is None:
        raise ConfigError("task.num_inference_steps=null, and the pipeline does not say how many it takes; give them")
    chosen = frozenset(torch.linspace(0, length - 1, min(task.states, length)).round().int().tolist())
    watch = _Watch(length, kept=chosen)
    final = generate_latents(context, sampling, components, watch)
    if watch.steps % length:
        raise ConfigError(f"the model took {watch.steps} steps, which are no whole trajectories of {length}; no score")
    batches: dict[str, list[Batch]] = {name: [] for name in components}
    for place, calls in watch.calls.items():
        changed = _Watch(length, changed=place)
        moved = generate_latents(context, sampling, components, changed) - final
        gain = float(moved.double().square().sum()) / max(changed.change, torch.finfo(torch.float64).tiny)
        weight = gain / final.numel() * length / len(chosen)
        for args, kwargs, output in calls:
            weights = torch.full((len(output),), weight, device=context.device)
            batches[place[0]].append(Batch(args, kwargs, weights))
    for name, found in batches.items():
        if not any(bool(batch.weights.any()) for batch in found):
            raise ConfigError(
                f"no output of '{name}' at the steps of a trajectory changes the samples; task=sensitivity scores the "
                "denoiser: leave it out of model.quantize"
            )
        batches[name] = merge_calls(context.models[name], found)
    unit = "mean squared error of the final latents, errors of steps taken as independent"
    return Calibration(batches, "squared_error", unit, len(final))


def generate_latents(
    context: RunContext, sampling: Any, components: Sequence[str] = (), watch: _Watch | None = None
) -> Tensor:
    """Generate the samples, while networks may be watched; returns the final latents, or samples, in fp32."""
    watch = watch or _Watch(1)
    with _watched(context.models, components, watch.after_call):
        outputs = context.source.generate(
            context.models, sampling, seed=context.seed, device=context.device, on_step=watch.on_step
        )
    final = outputs.get("latents", watch.final)
    assert final is not None  # models of images report their states
    return final.float().cpu()


@contextmanager
def _watched(models: Mapping[str, nn.Module], components: Sequence[str], after: Callable[..., None]) -> Iterator[None]:
    def hook(name: str) -> Any:
        return lambda module, args, kwargs, returned: after(name, args, kwargs, returned)

    handles = [models[name].register_forward_hook(hook(name), with_kwargs=True) for name in components]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def merge_calls(model: nn.Module, batches: Sequence[Batch]) -> list[Batch]:
    """Put calls together that a network can answer at once: fewer, larger calls are faster.

    What has a row for each of the output's is joined, and everything else must be the same; whether the network then
    gives the same is tried.
    """
    merged = _merge(batches)
    if merged is None:
        return list(batches)
    with torch.no_grad():
        first = first_tensor(model(*batches[0].args, **batches[0].kwargs))
        if first.numel() * len(merged.weights) > LOGITS * len(first):
            return list(batches)  # too large an output at once
        expected = torch.cat([first, *(first_tensor(model(*batch.args, **batch.kwargs)) for batch in batches[1:])])
        found = first_tensor(model(*merged.args, **merged.kwargs))
    same = found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-3, atol=1e-4)
    return [merged] if same else list(batches)


def _merge(batches: Sequence[Batch]) -> Batch | None:
    leaves, specs = zip(*(tree_flatten((batch.args, dict(batch.kwargs))) for batch in batches), strict=True)
    if any(spec != specs[0] for spec in specs):
        return None
    rows = [len(batch.weights) for batch in batches]
    joined: list[Any] = []
    for values in zip(*leaves, strict=True):
        tensors = [value for value in values if isinstance(value, Tensor)]
        if tensors and len(tensors) == len(values) and [t.shape[:1] for t in tensors] == [(n,) for n in rows]:
            if any(tensor.shape[1:] != tensors[0].shape[1:] for tensor in tensors):
                return None
            joined.append(torch.cat(tensors))
        elif all(_is_same(value, values[0]) for value in values):
            joined.append(values[0])
        else:
            return None
    if sum(value.numel() for value in joined if isinstance(value, Tensor)) > INPUTS:
        return None
    args, kwargs = tree_unflatten(joined, specs[0])
    return Batch(args, kwargs, torch.cat([batch.weights for batch in batches]))


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and bool((one == other).all())
    return type(one) is type(other) and not isinstance(one, Tensor) and bool(one == other)
