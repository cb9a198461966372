"""`task=generate` for language models: continue prompts, then read a text, if there is one, as `task=perplexity` does.

The first says what a user sees: how many answers quantization changes. The second, on the same loaded model, says how
far its probabilities moved, which shows long before answers change.
"""

from __future__ import annotations

from typing import cast

from qexp.models.base import TextSource
from qexp.system.files import to_csv, write_text
from qexp.tasks.context import RunContext
from qexp.tasks.perplexity import PerplexityConfig, read_tokens, score_text
from qexp.tasks.recorder import TaskResult

TEXTS = "texts.csv"  # prompt, text


def run_generate_text(context: RunContext) -> TaskResult:
    """Continue the prompts once; a step is a new token of a whole batch.

    Metrics: those of `Recorder.times` (a step is a token for a whole batch), time/total_seconds and
    time/tokens_per_second (all prompts together), of the continuation alone. texts.csv has prompts and
    continuations for people.
    """
    source, task = cast(TextSource, context.source), context.task
    prompts = source.prompts(task)
    recorder = context.recorder("generating", None)
    recorder.begin()
    outputs = source.generate(context.models, task, seed=context.seed, device=context.device, on_step=recorder.on_step)
    times = recorder.times(int(outputs["lengths"].sum()))
    texts = source.decode(outputs["tokens"])
    rows = [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)]
    write_text(context.folder / TEXTS, to_csv(["prompt", "text"], rows))
    if task.text is not None or source.has_text:
        reading = PerplexityConfig(text=task.text)
        tokens, progress = read_tokens(context, reading), context.recorder("reading the text", None)
        progress.begin()
        outputs |= score_text(context, tokens, reading, progress)
    return TaskResult(outputs, recorder.rows, times)
