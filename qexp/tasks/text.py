"""`task=generate` for language models: continue prompts, then read a text, if there is one, as `task=perplexity` does.

The first says what a user sees: how many answers quantization changes. The second, on the same loaded model, says how
far its probabilities moved, which shows long before answers change.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from qexp.system.files import to_csv, write_text
from qexp.tasks.perplexity import PerplexityConfig, evaluate
from qexp.tasks.recorder import Recorder, TaskResult

if TYPE_CHECKING:
    import torch
    from torch import nn

    from qexp.config.generate import GenerateConfig
    from qexp.models.base import TextSource

TEXTS = "texts.csv"  # prompt, text


def run(
    source: TextSource,
    models: dict[str, nn.Module],
    task: GenerateConfig,
    *,
    seed: int,
    device: torch.device,
    memory: Callable[[], tuple[float, float]],
    folder: Path,
) -> TaskResult:
    """Continue the prompts once; `memory()` gives (host_gib, device_gib) after each new token.

    Metrics: those of `Recorder.step_times` (a step is a token for a whole batch), time/total_seconds and
    time/tokens_per_second (all prompts together), of the continuation alone. texts.csv has prompts and
    continuations for people.
    """
    prompts = source.prompts(task)
    recorder = Recorder("generate", None, device, memory)
    started = recorder.begin()
    outputs = source.generate(models, task, seed=seed, device=device, on_step=recorder.on_step)
    seconds = time.perf_counter() - started
    texts = source.decode(outputs["tokens"])
    rows = [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)]
    write_text(folder / TEXTS, to_csv(["prompt", "text"], rows))
    metrics = {
        **recorder.step_times(),
        "time/total_seconds": seconds,
        "time/tokens_per_second": int(outputs["lengths"].sum()) / seconds,
    }
    if task.text is not None or source.has_text:
        reading = PerplexityConfig(text=task.text)
        tokens = source.encode(source.text(task.text))[: reading.max_tokens]
        progress = Recorder("perplexity", None, device, memory)
        progress.begin()
        outputs |= evaluate(models["model"], tokens, source.begin_token, reading, device, folder, progress)
    return TaskResult(outputs, recorder.rows, metrics)
