"""Calling a pipeline for a task: its arguments, checked before anything is loaded, and images in batches of prompts.

The noise of image number i is that of a CPU generator seeded with seed + i, so it depends neither on the device nor on
the batch that the image is in; in half precision it is the same noise, rounded (torch draws in fp32 there). Pipelines
whose denoising draws more noise take it from the same generators.

What is recorded after a step are some thousand values of the latents, evenly spaced, and not all of them: trajectories
of videos would take gigabytes. The last latents are kept whole.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qexp.errors import ConfigError, choices, did_you_mean, first_names

if TYPE_CHECKING:
    from qexp.config.generate import GenerateConfig

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
# They repeat texts one by one, but the texts' masks as a whole: of several prompts, images would have others' masks.
# https://github.com/huggingface/diffusers/blob/main/src/diffusers/pipelines/qwenimage/pipeline_qwenimage.py
MIXING_MASKS = ("QwenImage", "HunyuanImage")  # with which the classes' names begin


def check_arguments(pipeline: Any, task: GenerateConfig) -> None:
    """Raises: ConfigError for a task that the pipeline's call does not take."""
    known = inspect.signature(pipeline.__call__).parameters
    kind = type(pipeline).__name__
    _check_kind(kind, task, known)
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
    """Raises: ConfigError for a pipeline of another kind: not of prompts, not of prompts alone, or without steps."""
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
    """What the task sets of a pipeline's call, the same for all prompts."""
    named = {name: getattr(task, name) for name in NAMED if getattr(task, name) is not None}
    if task.num_images_per_prompt is not None:
        named[next((name for name in PER_PROMPT if name in known), PER_PROMPT[0])] = task.num_images_per_prompt
    if task.negative_prompt is not None:
        named["negative_prompt"] = task.negative_prompt[0]
    return {**named, **task.pipeline_arguments}


def number_of_steps(pipeline: Any, task: GenerateConfig, prompts: int) -> int | None:
    """How many steps a task takes, if the pipeline says how many are its default."""
    known = inspect.signature(pipeline.__call__).parameters
    default = known["num_inference_steps"].default if "num_inference_steps" in known else None
    steps = task.num_inference_steps or default
    return steps * -(-prompts // (task.batch_size or 1)) if isinstance(steps, int) else None


def run_pipeline(
    pipeline: Any,
    prompts: list[str],
    task: GenerateConfig,
    *,
    seed: int,
    on_step: Callable[[int, Tensor | None], None],
) -> dict[str, Tensor]:
    """Images of every prompt: "images" [n, channels, height, width] in [-1, 1], "latents" [images or videos, ...] of
    the end, and "labels" [n], the number of each one's prompt. The frames of a video are images, one behind the
    other.
    """
    known = inspect.signature(pipeline.__call__).parameters
    fixed, size = arguments_of(task, known), task.batch_size or 1
    copies = task.num_images_per_prompt or 1
    steps, images, latents = _Steps(on_step), list[Tensor](), list[Tensor]()
    negative = list(task.negative_prompt or ())
    repeats = copies if type(pipeline).__name__.startswith(MIXING_MASKS) else 1
    if repeats > 1:
        fixed.update({name: 1 for name in PER_PROMPT if name in fixed})
    for start in range(0, len(prompts), size):
        batch = prompts[start : start + size]
        if negative:
            texts = negative[start : start + size] if len(negative) > 1 else negative * len(batch)
            fixed["negative_prompt"] = _repeated(texts, repeats)
        first = seed + start * copies
        generators = [torch.Generator("cpu").manual_seed(first + number) for number in range(len(batch) * copies)]
        with torch.no_grad():
            output = pipeline(
                prompt=_repeated(batch, repeats),
                generator=generators,
                output_type="pt",
                **fixed,
                **steps.arguments(known),
            )
        images.append(_as_images(output))
        latents.append(steps.last.to("cpu", torch.float32))
    frames = sum(map(len, images)) // (len(prompts) * copies)
    labels = torch.arange(len(prompts)).repeat_interleave(copies * frames)
    return {"images": torch.cat(images), "latents": torch.cat(latents), "labels": labels}


def _repeated(texts: list[str], copies: int) -> list[str]:
    """Each text that many times, one behind the other, as pipelines order the images of their prompts."""
    return [text for text in texts for _ in range(copies)]


class _Steps:
    """Counts the steps of all batches, and reports them with a sample of their latents."""

    last: Tensor

    def __init__(self, on_step: Callable[[int, Tensor | None], None]) -> None:
        self.on_step, self.count, self.width = on_step, 0, 0

    def arguments(self, known: Mapping[str, Any]) -> dict[str, Any]:
        """What has a pipeline call us after each step."""
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
    """A pipeline's output in [0, 1], [n, channels, height, width], or of videos with frames, as images in [-1, 1]."""
    values = output.images if hasattr(output, "images") else output.frames
    images: Tensor = 2 * values.to("cpu", torch.float32) - 1
    return images.flatten(0, 1) if images.ndim == 5 else images


def _check_sizes(pipeline: Any, task: GenerateConfig) -> None:
    """Raises: ConfigError for sizes that the pipeline would round, with no more than a warning."""
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
    """What the pipeline checks itself when it is called, asked now. Raises: ConfigError with its answer."""
    check = getattr(pipeline, "check_inputs", None)
    if check is None:
        return
    given = {**arguments_of(task, known), "prompt": list(task.prompt), "callback_steps": 1}
    if task.negative_prompt is not None:
        given["negative_prompt"] = list(task.negative_prompt) * (
            len(task.prompt) if len(task.negative_prompt) == 1 else 1
        )
    defaults = {name: parameter.default for name, parameter in known.items()}
    wanted = {name: given.get(name, defaults.get(name)) for name in inspect.signature(check).parameters}
    if any(wanted.get(name, 0) is None for name in ("height", "width")):
        return  # the size that it then takes is its own affair, and so is all the rest
    try:
        check(**wanted)
    except ValueError as error:
        raise ConfigError(f"task: {type(pipeline).__name__} refuses it: {error}") from error
