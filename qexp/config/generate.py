"""The settings of `task=generate`, and the ones that each kind of model uses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Self

from qexp.config.task import TaskConfig
from qexp.errors import ConfigError, choices, did_you_mean
from qexp.system.text_files import read_lines

COUNTS = (
    "num_images", "num_inference_steps", "num_images_per_prompt", "height", "width", "num_frames",
    "max_sequence_length",
    "max_new_tokens", "batch_size", "top_k",
)  # fmt: skip
IMAGE_DEFAULTS = {"num_images": 200, "num_inference_steps": 20, "guidance_scale": 1.0, "batch_size": 50}
OF_IMAGES = ("num_images", "num_inference_steps", "guidance_scale")
OF_TEXT = ("prompt", "max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "text", "batch_size")
OF_PIPELINES = (
    "negative_prompt", "num_images_per_prompt", "height", "width", "num_frames", "max_sequence_length",
    "true_cfg_scale", "pipeline_arguments",
)  # fmt: skip


@dataclass(frozen=True)
class GenerateConfig(TaskConfig):
    """Of the digits model: num_images, num_inference_steps, guidance_scale (null: 200, 20, and 1, no guidance).

    Of pipelines (null: the pipeline's own default): prompt, negative_prompt, a text or a list of them, or @file with
    one a line; num_images_per_prompt (of videos, too); num_inference_steps, guidance_scale, true_cfg_scale, height,
    width, num_frames, max_sequence_length; pipeline_arguments, any others of its call; batch_size, prompts at a time
    (1).

    Of text: prompt, a text or a list of them to go on from, or @file with one a line (null: the model's own);
    max_new_tokens, do_sample, temperature, top_k, top_p as in transformers (null: as the model's generation_config
    says); batch_size, prompts at a time (50); text, a file to measure perplexity on besides (null: the model's own, if
    it has one).
    """

    name: str = "generate"
    num_images: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    prompt: Any = None
    negative_prompt: Any = None
    num_images_per_prompt: int | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    max_sequence_length: int | None = None
    true_cfg_scale: float | None = None
    pipeline_arguments: dict[str, Any] = field(default_factory=dict)
    max_new_tokens: int | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    batch_size: int | None = None
    text: str | None = None

    FILES: ClassVar[tuple[str, ...]] = ("text",)

    def __post_init__(self) -> None:
        for name in ("prompt", "negative_prompt"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("guidance_scale", "true_cfg_scale"):
            if (value := getattr(self, name)) is not None and not math.isfinite(value):
                raise ConfigError(f"task.{name}={value} must be a finite number; 1 is no guidance")
        self.check_least(**dict.fromkeys(COUNTS, 1))
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise ConfigError(f"task.temperature={self.temperature} must be above 0; task.do_sample=false is greedy")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"task.top_p={self.top_p} must be above 0, and at most 1")

    def resolved_by(self, resolve: Callable[[GenerateConfig], GenerateConfig]) -> GenerateConfig:
        """Return the settings with a list of prompts in place of one prompt or a file's name."""
        return resolve(self)

    def resolved(self) -> Self:
        """Return the task with the prompts themselves in place of one, or of a file's name."""
        negative = read_prompts(self.negative_prompt, "task.negative_prompt", may_be_empty=True)
        return replace(self, prompt=read_prompts(self.prompt), negative_prompt=negative)

    def ignored_fields(self) -> set[str]:
        """Return the fields of pipelines that have their defaults: other models do not have them."""
        return {name for name in OF_PIPELINES if not getattr(self, name) and getattr(self, name) != 0}


def for_images(task: GenerateConfig) -> GenerateConfig:
    """Return the settings of an image model other than a pipeline. Raises ConfigError for one without effect."""
    return _complete(task, OF_IMAGES, IMAGE_DEFAULTS)


def for_text(task: GenerateConfig) -> GenerateConfig:
    """Return the settings of a text model, with defaults. Raises ConfigError for one without effect."""
    return _complete(task, OF_TEXT, IMAGE_DEFAULTS)


def for_pipelines(task: GenerateConfig) -> GenerateConfig:
    """Return the settings of a pipeline; null is its own default. Raises ConfigError for one without effect."""
    taken = ("prompt", "num_inference_steps", "guidance_scale", "batch_size", *OF_PIPELINES)
    return _complete(task, taken, {"batch_size": 1})


def _complete(task: GenerateConfig, taken: Sequence[str], defaults: Mapping[str, Any]) -> GenerateConfig:
    """Return the fields that the model uses, `taken`, over defaults; raise ConfigError for another that is set."""
    own = {name: value for name in taken if (value := getattr(task, name)) is not None}
    found = GenerateConfig(**{**defaults, **own})
    for item in fields(task):
        value = getattr(task, item.name)
        if item.name not in taken and value not in (None, {}) and value != getattr(found, item.name):
            typed = list(value) if isinstance(value, tuple) else value
            raise ConfigError(
                f"task.{item.name}={typed} has no effect on this model{did_you_mean(item.name, taken)}; leave it "
                f"out, or set {choices(taken)}"
            )
    return found


def read_prompts(value: Any, place: str = "task.prompt", may_be_empty: bool = False) -> tuple[str, ...] | None:
    """Return task.prompt as a tuple: of one text, of a list, or of the lines of @file. Raises ConfigError."""
    if value is None:
        return None
    if isinstance(value, str) and value.startswith("@"):
        lines = read_lines(value[1:], f"{place}={value}", "give a UTF-8 file with a prompt a line")
        value = [line for line in lines if line]
    prompts = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list | tuple) else ()
    if not prompts or not all(isinstance(prompt, str) and (prompt or may_be_empty) for prompt in prompts):
        raise ConfigError(f"{place}={value} must be a text, a list of texts, or @file with one per line; quote numbers")
    return prompts
