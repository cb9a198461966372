"""Generate samples from fixed seeds, so that a candidate and its reference start from the same noise.

What is generated depends on the model: images here, text in `text.py`. What is recorded after a step (state, memory)
is outside the time of the step, but inside `time/total_seconds`.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qexp.errors import ConfigError
from qexp.tasks.recorder import Recorder, TaskResult

if TYPE_CHECKING:
    import torch
    from torch import nn

    from qexp.models.base import ModelSource


@dataclass(frozen=True)
class GenerateConfig:
    """Of images: num_images, num_inference_steps, and guidance_scale (1 is without guidance).

    Of text: prompt, a text or a list of them to go on from, or @file with one a line (null: the model's own);
    max_new_tokens, do_sample, temperature, top_k, top_p as in transformers (null: as the model's generation_config
    says); batch_size, prompts at a time; text, a file to measure perplexity on besides (null: the model's own, if it
    has one).
    """

    name: str = "generate"
    num_images: int = 200
    num_inference_steps: int = 20
    guidance_scale: float = 1.0
    prompt: Any = None
    max_new_tokens: int | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    batch_size: int = 50
    text: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.prompt, list):
            object.__setattr__(self, "prompt", tuple(self.prompt))
        if self.num_images < 1 or self.num_inference_steps < 1:
            raise ConfigError(
                f"task.num_images={self.num_images} and task.num_inference_steps={self.num_inference_steps} "
                "must be 1 or more"
            )
        if not math.isfinite(self.guidance_scale):
            raise ConfigError(f"task.guidance_scale={self.guidance_scale} must be a finite number; 1 is no guidance")
        for name in ("max_new_tokens", "batch_size", "top_k"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"task.{name}={value} must be 1 or more")
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise ConfigError(f"task.temperature={self.temperature} must be above 0; task.do_sample=false is greedy")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"task.top_p={self.top_p} must be above 0, and at most 1")

    def resolved(self) -> GenerateConfig:
        """With the prompts themselves in place of one, or of a file's name."""
        return replace(self, prompt=read_prompts(self.prompt))

    def input_files(self) -> dict[str, Path]:
        """Fields that name a file, whose content is what counts."""
        return {"text": Path(self.text).expanduser()} if self.text is not None else {}


def read_prompts(value: Any) -> tuple[str, ...] | None:
    """task.prompt as a tuple: of one text, of a list, or of the lines of @file. Raises ConfigError."""
    if value is None:
        return None
    if isinstance(value, str) and value.startswith("@"):
        try:
            value = [line for line in Path(value[1:]).expanduser().read_text(encoding="utf-8").splitlines() if line]
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not a text file"
            raise ConfigError(
                f"task.prompt={value} cannot be read: {reason}; give a file with a prompt a line"
            ) from error
    prompts = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list | tuple) else ()
    if not prompts or not all(isinstance(prompt, str) and prompt for prompt in prompts):
        raise ConfigError(
            f"task.prompt={value} must be a text, a list of them, or @file with one a line; quote what looks like a "
            "number"
        )
    return prompts


Config = GenerateConfig


def run(
    source: ModelSource,
    models: dict[str, nn.Module],
    task: GenerateConfig,
    *,
    seed: int,
    device: torch.device,
    memory: Callable[[], tuple[float, float]],
) -> TaskResult:
    """Generate once; `memory()` gives (host_gib, device_gib) after each step.

    Outputs: images, labels and trajectory [steps, n, ...] fp32, the state after each step. Rows: step (from 1),
    step_ms, host_gib, device_gib. Metrics: time/step_ms (median) and time/total_seconds.
    """
    import torch

    recorder = Recorder("generate", task.num_inference_steps, device, memory)
    started = recorder.begin()
    outputs = source.generate(models, task, seed=seed, device=device, on_step=recorder.on_step)
    total_seconds = time.perf_counter() - started
    times_ms = [row["step_ms"] for row in recorder.rows]
    return TaskResult(
        outputs={**outputs, "trajectory": torch.stack(recorder.states)},
        rows=recorder.rows,
        metrics={"time/step_ms": statistics.median(times_ms), "time/total_seconds": total_seconds},
    )
