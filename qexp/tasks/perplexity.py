"""How well a language model predicts a text, token by token, in a window that slides over it.

A window is the tokenizer's beginning-of-sequence token, if it has one, and up to `window` - 1 tokens of the text. The
first window scores all of them, the next ones begin `stride` tokens later and score the last `stride`: every token is
scored once, and none but the first with less than `window - 1 - stride` before it. (Without a beginning token the very
first one of the text is not scored.)

What is saved, of each scored token, is enough to compare any two models afterwards without running them again:

    outputs.safetensors    targets, the tokens; nll = -ln p(token), fp32; top1, the most probable token; windows, the
                           number of the window that scores it; bytes of the text that it stands for, where the
                           tokenizer says so
    logprobs.safetensors   logprobs [tokens, kept], fp32, and ids [tokens, kept]: ln p of the `logprobs` most probable
                           next tokens, in falling order. Where all of the vocabulary is kept it lies in its own order,
                           without ids. Written window by window: it is never all in memory

Sources: https://huggingface.co/docs/transformers/perplexity (sliding window); llama.cpp's perplexity tool (KL
divergence from the unquantized model's saved logits).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, ClassVar, cast

from qexp.config.task import TaskConfig
from qexp.config.text_windows import window_and_stride
from qexp.errors import ConfigError
from qexp.tasks.recorder import Recorder, TaskResult

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qexp.checkpoints.row_file import RowFile
    from qexp.models.base import TextSource
    from qexp.tasks.context import RunContext

LOGPROBS = "logprobs.safetensors"
POSITIONS = 64  # whose logits are in fp32 at a time: a vocabulary of 128k tokens takes 32 MiB


@dataclass(frozen=True)
class PerplexityConfig(TaskConfig):
    """text: a UTF-8 file (null: the model's own, if it has one); max_tokens: of it, from its beginning; null is all;
    window: tokens the model sees at once, null for as many as it can, at most 2048; stride: tokens scored in each,
    null for half of it; batch_size: windows at a time; logprobs: most probable next tokens that are kept to compare
    with (null: all of the vocabulary)."""

    name: str = "perplexity"
    text: str | None = None
    max_tokens: int | None = 16384
    window: int | None = None
    stride: int | None = None
    batch_size: int = 4
    logprobs: int | None = 1024

    FILES: ClassVar[tuple[str, ...]] = ("text",)

    def __post_init__(self) -> None:
        self.check_least(max_tokens=2, window=2, stride=1, batch_size=1, logprobs=1)
        if self.window is not None:
            window_and_stride(None, self.window, self.stride, has_begin=False)  # the least that any model asks for


Config = PerplexityConfig


@dataclass(frozen=True)
class Window:
    """Tokens begin..stop of the text are read, those from `scored` on are scored."""

    begin: int
    scored: int
    stop: int


def run_perplexity(context: RunContext) -> TaskResult:
    """Read the text once; a step is a batch of windows.

    Metrics: those of `Recorder.times` (a step is a batch of windows), time/total_seconds, time/tokens_per_second.
    """
    tokens = read_tokens(context, context.task)
    recorder = context.recorder("reading the text", None)
    recorder.begin()
    outputs = score_text(context, tokens, context.task, recorder)
    return TaskResult(outputs, recorder.rows, recorder.times(len(outputs["nll"])))


def read_tokens(context: RunContext, task: PerplexityConfig) -> Tensor:
    """Return the first `max_tokens` tokens of the text, [n]."""
    source = cast("TextSource", context.source)
    return source.encode(source.text(task.text))[: task.max_tokens]


def score_text(context: RunContext, tokens: Tensor, task: PerplexityConfig, recorder: Recorder) -> dict[str, Tensor]:
    """Return targets, nll, top1 and window of every scored token; write their log-probabilities to the run's folder.

    task: how the text is read; it is not the run's own where `task=generate` reads one besides.
    """
    import torch

    from qexp.checkpoints.row_file import row_file

    model: Any = context.models["model"]
    begin_token = cast("TextSource", context.source).begin_token
    windows = list(windows_of(len(tokens), *window_sizes(model.config, task, begin_token), begin_token is not None))
    vocabulary = int(model.config.get_text_config().vocab_size)
    kept = min(task.logprobs or vocabulary, vocabulary)
    first = windows[0].scored
    count = len(tokens) - first
    outputs = {
        "targets": tokens[first:].to(torch.int32),
        "nll": torch.empty(count),
        "top1": torch.empty(count, dtype=torch.int32),
        "windows": _windows_of_tokens(windows),
        **_bytes_of_tokens(context, task, first, count),
    }
    shapes = {"logprobs": (torch.float32, (count, kept)), "ids": (torch.int32, (count, kept))}
    if kept == vocabulary:
        del shapes["ids"]
    batches = list(batches_of(windows, task.batch_size))
    recorder.steps = len(batches)
    with row_file(context.folder / LOGPROBS, shapes) as file, torch.no_grad():
        for step, batch in enumerate(batches, start=1):
            logits = _logits(model, tokens, batch, begin_token, context.device)
            for window, rows in zip(batch, logits, strict=True):
                for start in range(0, len(rows), POSITIONS):
                    part = rows[start : start + POSITIONS].float().log_softmax(-1)
                    _keep(part, window.scored - first + start, outputs, file, kept)
            recorder.on_step(step, None)
    return outputs


def _bytes_of_tokens(context: RunContext, task: PerplexityConfig, first: int, count: int) -> dict[str, Tensor]:
    """Return {"bytes": of the text for each scored token, int32}; {} if the tokenizer does not say."""
    import torch

    source = cast("TextSource", context.source)
    found = source.token_bytes(source.text(task.text))
    return {} if found is None else {"bytes": found[first : first + count].to(torch.int32)}


def _windows_of_tokens(windows: list[Window]) -> Tensor:
    """Return the number of its window for each scored token, int32."""
    import torch

    scored = torch.tensor([window.stop - window.scored for window in windows])
    return torch.arange(len(windows), dtype=torch.int32).repeat_interleave(scored)


def window_sizes(config: Any, task: PerplexityConfig, begin_token: int | None) -> tuple[int, int]:
    """Return (tokens of text in a window, tokens that it scores).

    Raises ConfigError if the model cannot see as many.
    """
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    return window_and_stride(longest, task.window, task.stride, has_begin=begin_token is not None)


def windows_of(count: int, tokens: int, stride: int, has_begin: bool) -> Iterator[Window]:
    """Yield the windows over `count` tokens of text. Raises ConfigError for a text too short to score anything."""
    if count < (1 if has_begin else 2):
        raise ConfigError(f"task.text has {count} tokens, too few to predict any; give a longer text")
    begin, scored = 0, 0 if has_begin else 1
    while scored < count:
        stop = min(begin + tokens, count)
        yield Window(begin, scored, stop)
        begin, scored = begin + stride, stop


def batches_of(windows: list[Window], size: int) -> Iterator[list[Window]]:
    """Yield batches of neighbours of the same shape, at most `size` at a time."""
    for _, group in groupby(windows, _shape):
        alike = list(group)
        yield from (alike[start : start + size] for start in range(0, len(alike), size))


def _shape(window: Window) -> tuple[int, int]:
    return window.stop - window.begin, window.stop - window.scored


def _logits(model: Any, tokens: Tensor, batch: list[Window], begin_token: int | None, device: torch.device) -> Tensor:
    """Return the logits that predict the scored tokens of windows of one shape, [windows, scored, vocabulary]."""
    import torch

    inputs = torch.stack([tokens[window.begin : window.stop] for window in batch])
    if begin_token is not None:
        inputs = torch.nn.functional.pad(inputs, (1, 0), value=begin_token)
    scored = batch[0].stop - batch[0].scored
    taken = inspect.signature(type(model).forward).parameters
    options = {"use_cache": False, "logits_to_keep": scored}
    options = {name: value for name, value in options.items() if name in taken}
    logits: Tensor = model(inputs[:, :-1].to(device), **options).logits
    return logits[:, -scored:]  # some models give those of all positions, whatever they are asked for


def _keep(part: Tensor, start: int, outputs: dict[str, Tensor], file: RowFile, kept: int) -> None:
    """Save what belongs to some positions. part: ln p of all next tokens, [positions, vocabulary]."""
    rows = slice(start, start + len(part))
    targets = outputs["targets"][rows].to(part.device).long()
    outputs["nll"][rows] = -part.gather(1, targets[:, None])[:, 0].cpu()
    outputs["top1"][rows] = part.argmax(-1).int().cpu()
    if kept == part.shape[1]:
        file.put("logprobs", start, part)
        return
    values, ids = part.topk(kept)
    file.put("logprobs", start, values)
    file.put("ids", start, ids.int())
