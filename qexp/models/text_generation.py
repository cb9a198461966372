"""Continuing prompts with transformers' own `generate`, batch by batch, with a call after every new token."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from qexp.errors import ConfigError, LoadError

if TYPE_CHECKING:
    from qexp.config.generate import GenerateConfig

DEFAULT_NEW_TOKENS = 64  # where neither the task nor the model's generation_config says how many
SETTINGS = ("max_new_tokens", "do_sample", "temperature", "top_k", "top_p")


def continue_prompts(
    model: Any,
    tokenizer: Any,
    prompts: list[str],
    task: GenerateConfig,
    *,
    seed: int,
    device: torch.device,
    on_step: Callable[[int, Tensor | None], None],
) -> dict[str, Tensor]:
    """Of every prompt: "tokens" [prompts, longest], the new ones, padded behind their end, "lengths" [prompts], and
    "nonfinite" [prompts], how many new tokens have probabilities that are not finite; "prompts" are its own tokens,
    padded in front."""
    settings, steps = generation_settings(model.generation_config, task, tokenizer), _Steps(on_step)
    writes_answers = bool(getattr(model.config, "is_encoder_decoder", False))  # behind one token, not behind the prompt
    asked, parts = tokenizer(prompts, return_tensors="pt", padding=True), []
    torch.manual_seed(seed)
    size, counts = task.batch_size or len(prompts), list[Tensor]()
    for start in range(0, len(prompts), size):
        rows = slice(start, start + size)
        inputs = {name: asked[name][rows].to(device) for name in ("input_ids", "attention_mask")}
        with torch.no_grad(), _watching(model, draws=bool(settings.do_sample)) as broken:
            tokens = model.generate(
                **inputs, generation_config=settings, stopping_criteria=StoppingCriteriaList([steps])
            )
        parts.append(tokens[:, 1 if writes_answers else inputs["input_ids"].shape[1] :].cpu())
        counts.append(_count_nonfinite(broken, _lengths(parts[-1], settings.eos_token_id)))
    longest = max(part.shape[1] for part in parts)
    padding: Any = settings.pad_token_id
    padded = [torch.nn.functional.pad(part, (0, longest - part.shape[1]), value=padding) for part in parts]
    lengths = torch.cat([_lengths(part, settings.eos_token_id) for part in parts])
    tensors = {"prompts": asked["input_ids"], "tokens": torch.cat(padded), "lengths": lengths}
    tensors["nonfinite"] = torch.cat(counts)
    return {name: tensor.to(torch.int32) for name, tensor in tensors.items()}


def encode_lines(model: Any, tokenizer: Any, lines: list[str]) -> dict[str, Tensor]:
    """The arguments of a forward for lines of text, [lines, longest], padded behind them.

    A decoder that answers them begins with its start token, so that its outputs are those of the first token to come.
    """
    encoded = tokenizer(lines, return_tensors="pt", padding=tokenizer.pad_token is not None, padding_side="right")
    taken = inspect.signature(type(model).forward).parameters
    inputs = {name: tensor for name, tensor in encoded.items() if name in taken}
    start = getattr(model.config, "decoder_start_token_id", None)
    if getattr(model.config, "is_encoder_decoder", False) and "decoder_input_ids" in taken and start is not None:
        inputs["decoder_input_ids"] = torch.full((len(lines), 1), start)
    return inputs


def _lengths(tokens: Tensor, end_tokens: int | list[int] | None) -> Tensor:
    """How many new tokens each row has, the end token included: what follows that is padding."""
    ends = torch.tensor([end_tokens] if isinstance(end_tokens, int) else end_tokens or [], dtype=tokens.dtype)
    is_end = torch.isin(tokens, ends)
    return torch.where(is_end.any(-1), is_end.int().argmax(-1) + 1, tokens.shape[1])


@contextmanager
def _watching(model: Any, draws: bool) -> Iterator[list[Tensor]]:
    """Collect, for each forward of the model, which rows have no probabilities for the next token, [rows].

    Greedy search and beams go on with NaN as if it were the least token: only the logits tell. A single logit of minus
    infinity is a token that the model rules out; so a row is judged by the sum of its exponentials.
    draws: stop at once, since nothing can be drawn from such a row.
    """
    broken: list[Tensor] = []

    def look(module: Any, inputs: Any, output: Any) -> None:
        broken.append(~output.logits[:, -1].float().logsumexp(-1).isfinite())
        if draws and bool(broken[-1].any()):
            raise LoadError(
                f"the probabilities of token {len(broken)} are not finite, so none can be drawn; use another "
                "compute_dtype, repair the checkpoint, or set task.do_sample=false to see where it begins"
            )

    handle = model.register_forward_hook(look)
    try:
        yield broken
    finally:
        handle.remove()


def _count_nonfinite(broken: list[Tensor], lengths: Tensor) -> Tensor:
    """How many of each prompt's new tokens follow from probabilities that are not finite, [prompts].

    broken: for each token, [rows], where a prompt has several rows if there are beams; what comes behind the prompt's
    end does not count.
    """
    per_token = torch.stack(broken).cpu().view(len(broken), len(lengths), -1).any(-1)  # [tokens, prompts]
    return (per_token & (torch.arange(len(broken))[:, None] < lengths)).sum(0)


def generation_settings(base: GenerationConfig, task: GenerateConfig, tokenizer: Any) -> GenerationConfig:
    """The model's own generation_config, with what the task sets instead."""
    settings = copy.deepcopy(base)
    settings.update(**{name: value for name in SETTINGS if (value := getattr(task, name)) is not None})
    if settings.max_new_tokens is None:
        settings.max_new_tokens = DEFAULT_NEW_TOKENS
    if settings.pad_token_id is None:
        settings.pad_token_id = tokenizer.pad_token_id
    if settings.num_return_sequences not in (None, 1):
        raise ConfigError(
            f"generation_config.json has num_return_sequences={settings.num_return_sequences}, but a prompt is "
            "continued in one way only; set it to 1 there"
        )
    return settings


class _Steps(StoppingCriteria):
    """Never stops anything: it is asked after every new token, which is what it is here for."""

    def __init__(self, on_step: Callable[[int, Tensor | None], None]) -> None:
        self.on_step, self.count = on_step, 0

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        self.count += 1
        self.on_step(self.count, None)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
