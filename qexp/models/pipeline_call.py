"""Calling a pipeline for a task: its arguments, checked before anything is loaded, and images in batches of prompts.

The noise of image number i is that of a CPU generator seeded with seed + i, so it depends neither on the device nor on
the batch that the image is in; in half precision it is the same noise, rounded (torch draws in fp32 there). All that is
drawn during a call is from the same generators (`pipeline_noise.py`).

What is recorded after a step are some thousand values of the latents, evenly spaced, and not all of them: trajectories
of videos would take gigabytes. The last latents are kept whole.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qexp.config.generate import GenerateConfig
from qexp.errors import ConfigError, choices, did_you_mean, first_names
from qexp.models.base import OnStep
from qexp.models.pipeline_noise import MixedNoiseError, noise_of_samples
from qexp.models.pipeline_source import SAMPLES, checked_arguments, returned_fields, steps_of_call

TRAJECTORY_VALUES = 1 << 16  # of the latents after one step
NAMED = (  # fields of a task that are arguments of pipelines by the same names
    "num_inference_steps", "guidance_scale", "height", "width", "num_frames", "max_sequence_length", "true_cfg_scale",
)  # fmt: skip
OURS = {  # arguments that this program gives itself, and what to set instead
    "prompt": "task.prompt",
    "negative_prompt": "task.negative_prompt",
    "num_images_per_prompt": "task.num_images_per_prompt",
    "num_videos_per_prompt": "task.num_images_per_prompt",
    "generator": "seed",
    "latents": "seed",
    **{name: f"task.{name}" for name in NAMED},
}
NOT_OURS = ("output_type", "return_dict", "callback", "callback_steps", "callback_on_step_end")
PER_PROMPT = ("num_images_per_prompt", "num_videos_per_prompt")
# Pipelines whose samples do not depend on those beside them (each runs in tests/models/test_batches.py), and pipelines
# whose samples do not depend on others of the same prompt. Others pad texts to the longest without a mask (CogView4),
# give frames the embeddings of another sample (Latte), or take num_videos_per_prompt and make one (AnimateDiff,
# CogVideoX): of those, and of any that is not listed, each image or video is a call of its own.
BATCHED = (
    "FluxPipeline", "PixArtSigmaPipeline", "QwenImagePipeline", "StableDiffusion3Pipeline", "StableDiffusionPipeline",
    "StableDiffusionXLPipeline", "WanPipeline",
)  # fmt: skip
BATCHED_BY_PROMPT = ("LTXPipeline", "Lumina2Pipeline", "SanaPipeline")  # they repeat masks in another order than texts


def check_arguments(pipeline: Any, task: GenerateConfig) -> None:
    """Raise ConfigError for a task that the pipeline's call does not take."""
    known = inspect.signature(pipeline.__call__).parameters
    kind = type(pipeline).__name__
    _check_kind(kind, task, known)
    returned = returned_fields(pipeline)
    if returned is not None and not returned & {*SAMPLES}:
        raise ConfigError(
            f"model: {kind} gives {choices(returned)}, and task=generate compares images or the frames of videos; use "
            "a pipeline that gives them"
        )
    for name in task.pipeline_arguments:
        if name in OURS:
            raise ConfigError(f"task.pipeline_arguments.{name}: set {OURS[name]} instead")
        if name.startswith(NOT_OURS):
            raise ConfigError(f"task.pipeline_arguments.{name}: it is given by this program itself; leave it out")
    for name in arguments_of(task, known):
        if name not in known:
            is_field = name in (*NAMED, "negative_prompt", *PER_PROMPT)
            free = [other for other in known if other not in OURS and not other.startswith(NOT_OURS)]
            raise ConfigError(
                f"task.{'' if is_field else 'pipeline_arguments.'}{name} is no argument of "
                f"{kind}{did_you_mean(name, known)}; it takes {choices(name for name in NAMED if name in known)}, and "
                f"as task.pipeline_arguments {choices(free)}"
            )
    negative = task.negative_prompt or ()
    if len(negative) > 1 and len(negative) != len(task.prompt):
        raise ConfigError(
            f"task.negative_prompt has {len(negative)} texts for the {len(task.prompt)} of task.prompt; give one, or "
            f"one for each"
        )
    _check_sizes(pipeline, task)
    _ask_pipeline(pipeline, task, known)


def _check_kind(kind: str, task: GenerateConfig, known: Mapping[str, Any]) -> None:
    """Raise ConfigError for a pipeline of another kind: not of prompts, not of prompts alone, or without steps."""
    given = {"prompt", *arguments_of(task, known)}
    required = [
        name
        for name, one in known.items()
        if one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD) and name not in given
    ]
    if "prompt" not in known or required:
        wants = f"needs {first_names(required)}" if required else "takes no prompt"
        raise ConfigError(
            f"model: {kind} {wants}, and task=generate gives it prompts and numbers alone; use a pipeline that "
            "generates from a text"
        )
    if "callback_on_step_end" not in known and "callback" not in known:
        raise ConfigError(
            f"model: {kind} tells nobody about its steps (it has no callback_on_step_end), so it cannot be measured "
            "here; use another pipeline"
        )


def arguments_of(task: GenerateConfig, known: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a pipeline's call that the task sets, the same for all prompts."""
    named = {name: getattr(task, name) for name in NAMED if getattr(task, name) is not None}
    if task.num_images_per_prompt is not None:
        named[next((name for name in PER_PROMPT if name in known), PER_PROMPT[0])] = task.num_images_per_prompt
    if task.negative_prompt is not None:
        named["negative_prompt"] = task.negative_prompt[0]
    return {**named, **task.pipeline_arguments}


def number_of_steps(pipeline: Any, task: GenerateConfig, prompts: int) -> int | None:
    """Return how many steps a task takes, if the pipeline says how many are its default."""
    known = inspect.signature(pipeline.__call__).parameters
    default = known["num_inference_steps"].default if "num_inference_steps" in known else None
    steps = task.num_inference_steps or default
    if not isinstance(steps, int):
        return None
    calls = len([*_calls(pipeline, [""] * prompts, task, seed=0)])
    return calls * steps_of_call(getattr(pipeline, "scheduler", None), steps, "callback_on_step_end" in known)


@dataclass(frozen=True)
class _Call:
    """One call of a pipeline. copies: images of each prompt; seeds: of each image."""

    prompts: list[str]
    negative: list[str] | None
    copies: int
    seeds: list[int]

    def alone(self) -> list[_Call]:
        """Return the same images, each in a call of its own."""
        prompts, negative = (_repeated(texts, self.copies) for texts in (self.prompts, self.negative or []))
        return [
            _Call([prompts[number]], [negative[number]] if negative else None, 1, [seed])
            for number, seed in enumerate(self.seeds)
        ]


def _calls(pipeline: Any, prompts: list[str], task: GenerateConfig, seed: int) -> Iterator[_Call]:
    """The calls of a task. Prompts are repeated here where there are several: pipelines repeat masks in another order.

    https://github.com/huggingface/diffusers/issues/13634
    """
    kind, copies = type(pipeline).__name__, task.num_images_per_prompt or 1
    size = task.batch_size or 1 if kind in BATCHED else 1
    negative = list(task.negative_prompt or ())
    for start in range(0, len(prompts), size):
        batch = prompts[start : start + size]
        texts = negative[start : start + size] if len(negative) > 1 else negative * len(batch)
        seeds = [seed + start * copies + number for number in range(len(batch) * copies)]
        repeats = copies if len(batch) > 1 else 1
        call = _Call(_repeated(batch, repeats), _repeated(texts, repeats) or None, copies // repeats, seeds)
        yield from [call] if kind in (*BATCHED, *BATCHED_BY_PROMPT) else call.alone()


def run_pipeline(
    pipeline: Any, prompts: list[str], task: GenerateConfig, *, seed: int, on_step: OnStep
) -> dict[str, Tensor]:
    """Images of every prompt: "images" [n, channels, height, width] in [-1, 1], "latents" [images or videos, ...] of
    the end, and "labels" [n], the number of each one's prompt. The frames of a video are images, one behind the
    other. What a pipeline says of each sample (nsfw_content_detected) is there by the pipeline's name, bool.
    """
    steps, found = _Steps(on_step), list[dict[str, Tensor]]()
    for call in _calls(pipeline, prompts, task, seed):
        try:
            found.append(_outputs_of(pipeline, call, task, steps))
        except MixedNoiseError:
            found += [_outputs_of(pipeline, one, task, steps) for one in call.alone()]
    outputs = {name: torch.cat([part[name] for part in found]) for name in found[0]}
    of_prompt = len(outputs["images"]) // len(prompts)
    return {**outputs, "labels": torch.arange(len(prompts)).repeat_interleave(of_prompt)}


def _outputs_of(pipeline: Any, call: _Call, task: GenerateConfig, steps: _Steps) -> dict[str, Tensor]:
    known = inspect.signature(pipeline.__call__).parameters
    arguments = arguments_of(task, known)
    arguments.update({name: call.copies for name in PER_PROMPT if name in arguments})
    if call.negative is not None:
        arguments["negative_prompt"] = call.negative
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in call.seeds]
    with torch.no_grad(), noise_of_samples(generators):
        output = pipeline(
            prompt=call.prompts,
            generator=generators if len(generators) > 1 else generators[0],  # some take no list
            output_type="pt",
            **arguments,
            **steps.arguments(known),
        )
    latents = steps.last.to("cpu", torch.float32)
    return {"images": _as_images(output), "latents": latents, **_said(output, len(call.seeds))}


def _said(output: Any, samples: int) -> dict[str, Tensor]:
    """Return the fields of an output with a boolean for each sample, such as a safety checker's."""
    fields = {name: value for name, value in dict(output).items() if name not in SAMPLES}
    lists = {name: list(value) for name, value in fields.items() if isinstance(value, list | tuple | np.ndarray)}
    return {
        name: torch.tensor([bool(one) for one in values])
        for name, values in lists.items()
        if len(values) == samples and all(isinstance(one, bool | np.bool_) for one in values)
    }


def _repeated(texts: list[str], copies: int) -> list[str]:
    """Repeat each text `copies` times in a row, as pipelines order the images of their prompts."""
    return [text for text in texts for _ in range(copies)]


class _Steps:
    """Counts the steps of all batches, and reports them with a sample of their latents."""

    last: Tensor

    def __init__(self, on_step: OnStep) -> None:
        self.on_step, self.count, self.width = on_step, 0, 0

    def arguments(self, known: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments that make a pipeline call us after each step."""
        if "callback_on_step_end" in known:
            return {"callback_on_step_end": self._after_step, "callback_on_step_end_tensor_inputs": ["latents"]}
        return {"callback": lambda step, time, latents: self._record(latents), "callback_steps": 1}

    def _after_step(self, pipeline: Any, step: int, time: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        self._record(tensors["latents"])
        return {}

    def _record(self, latents: Tensor) -> None:
        self.count, self.last = self.count + 1, latents.detach()
        values = self.last.flatten()
        values = values[:: -(-len(values) // TRAJECTORY_VALUES)].float()
        self.width = self.width or len(values)
        self.on_step(self.count, torch.nn.functional.pad(values, (0, self.width - len(values))))  # a smaller last batch


def _as_images(output: Any) -> Tensor:
    """Return a pipeline's output in [0, 1], [n, channels, height, width] or videos, as images in [-1, 1]."""
    values = next((output[name] for name in SAMPLES if name in output), None)
    if not isinstance(values, Tensor):
        what = "nothing" if values is None else f"a {type(values).__name__}"
        raise ConfigError(
            f"model: the pipeline gives {what} in place of a tensor of images (fields: {choices(dict(output))}); use "
            "one that takes output_type='pt'"
        )
    images: Tensor = 2 * values.to("cpu", torch.float32) - 1
    return images.flatten(0, 1) if images.ndim == 5 else images


def _check_sizes(pipeline: Any, task: GenerateConfig) -> None:
    """Raise ConfigError for sizes that the pipeline would round, with no more than a warning."""
    processor = getattr(pipeline, "image_processor", None) or getattr(pipeline, "video_processor", None)
    multiple = processor.config.vae_scale_factor if processor is not None else 1
    for name in ("height", "width"):
        value = getattr(task, name)
        if value is not None and value % multiple:
            near = max(value // multiple, 1) * multiple
            raise ConfigError(
                f"task.{name}={value} must be a multiple of {multiple} for {type(pipeline).__name__}; use {near} or "
                f"{near + multiple}"
            )
    ratio = getattr(pipeline, "vae_scale_factor_temporal", None)
    if ratio and task.num_frames is not None and (task.num_frames - 1) % ratio:
        near = (task.num_frames - 1) // ratio * ratio + 1
        raise ConfigError(
            f"task.num_frames={task.num_frames} must be one more than a multiple of {ratio} for "
            f"{type(pipeline).__name__}; use {near} or {near + ratio}"
        )


def _ask_pipeline(pipeline: Any, task: GenerateConfig, known: Mapping[str, Any]) -> None:
    """Run the pipeline's own check of its arguments now, before weights are read.

    Raises: ConfigError with its answer.
    """
    check = getattr(pipeline, "check_inputs", None)
    if check is None:
        return
    given = {**arguments_of(task, known), "prompt": list(task.prompt), "callback_steps": 1}
    if task.negative_prompt is not None:
        copies = len(task.prompt) if len(task.negative_prompt) == 1 else 1
        given["negative_prompt"] = list(task.negative_prompt) * copies
    if "callback_on_step_end" in known:
        given["callback_on_step_end_tensor_inputs"] = ["latents"]
    wanted = checked_arguments(pipeline, given, known)
    if wanted is None or any(wanted.get(name, 0) is None for name in ("height", "width")):
        return  # what it then takes is its own affair
    try:
        check(**wanted)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"task: {type(pipeline).__name__} refuses it: {error}") from error
