"""Continuing prompts with transformers' own `generate`, batch by batch, with a call after every new token."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, StopStringCriteria
from transformers.generation import GenerationMode

from qexp.config.generate import GenerateConfig
from qexp.errors import ConfigError, LoadError
from qexp.models.base import OnStep
from qexp.models.prompt_tokens import encode_prompts, is_in_vocabulary, padded_inputs, writes_answers
from qexp.system.screen import say

DEFAULT_NEW_TOKENS = 64  # where neither the task nor the model's generation_config says how many
PADDING_ERROR, PADDING_ERROR_HALF = 0.001, 0.1  # of probability, that rounding may move in fp32, and in half precision
MODES = (
    GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE,
)  # fmt: skip
SETTINGS = ("max_new_tokens", "do_sample", "temperature", "top_k", "top_p")


def continue_prompts(
    model: Any,
    tokenizer: Any,
    prompts: list[str],
    task: GenerateConfig,
    *,
    seed: int,
    device: torch.device,
    on_step: OnStep,
) -> dict[str, Tensor]:
    """Of every prompt: "tokens" [prompts, longest], the new ones, padded behind their end, "lengths" [prompts], and
    "nonfinite" [prompts], how many new tokens have probabilities that are not finite; "prompts" are its own tokens,
    padded in front.

    A prompt is padded to the longest of its batch, not of all; where padding would change its answer, or tokens are
    drawn, it has a batch, and a seed, of its own.
    """
    settings, steps = generation_settings(model.generation_config, task, tokenizer, model), _Steps(on_step)
    rows, stops = encode_prompts(tokenizer, prompts), string_stops(settings, tokenizer)
    size = task.batch_size or len(prompts)
    if size > 1 and (reason := reason_not_to_batch(model, tokenizer, settings, rows, size, device)):
        say(f"prompts are continued one at a time: {reason}")
        size = 1
    parts, lengths, counts = list[Tensor](), list[Tensor](), list[Tensor]()
    for start in range(0, len(prompts), size):
        inputs = padded_inputs(rows[start : start + size], settings.pad_token_id, model)
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        torch.manual_seed(seed + start)
        with torch.no_grad(), _watching(model, draws=bool(settings.do_sample)) as broken:
            tokens = model.generate(
                **inputs,
                generation_config=settings,
                stopping_criteria=StoppingCriteriaList([steps]),
                tokenizer=tokenizer if settings.stop_strings else None,
            )
        begin = 1 if writes_answers(model) else inputs["input_ids"].shape[1]  # behind one token, or the prompt
        parts.append(tokens[:, begin:].cpu())
        lengths.append(_lengths(tokens.cpu(), begin, settings.eos_token_id, stops))
        counts.append(_count_nonfinite(broken, lengths[-1]))
    padding = settings.pad_token_id or 0
    asked = padded_inputs(rows, padding, model)["input_ids"]
    tensors = {"prompts": asked, "tokens": _stacked(parts, padding), "lengths": torch.cat(lengths)}
    tensors["nonfinite"] = torch.cat(counts)
    return {name: tensor.to(torch.int32) for name, tensor in tensors.items()}


def _stacked(parts: list[Tensor], padding: int) -> Tensor:
    """Return rows of batches, [rows, longest of all], padded behind their end."""
    longest = max(part.shape[1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, longest - part.shape[1]), value=padding) for part in parts])


def reason_not_to_batch(
    model: Any, tokenizer: Any, settings: GenerationConfig, rows: list[list[int]], size: int, device: torch.device
) -> str | None:
    """Return why prompts must not share a batch with this model; None if they may.

    transformers draws the tokens of a batch from one generator, so that a draw depends on those before it.

    A recurrent network reads padding whatever the mask says, and others count positions from it. Which do is not
    declared anywhere, so it is measured: the shortest prompt is asked for one token, alone and padded to the longest.
    """
    if settings.do_sample:
        return "their tokens are drawn, and draws in a batch depend on each other"
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    if all(len({len(row) for row in batch}) == 1 for batch in batches):
        return None
    if settings.pad_token_id is None:
        return "the tokenizer has no token to pad them with"
    short, long = min(rows, key=len), max(rows, key=len)
    alone = _next_token(model, tokenizer, settings, [short], device)
    padded = _next_token(model, tokenizer, settings, [short, long], device)
    limit = PADDING_ERROR if next(model.parameters()).dtype == torch.float32 else PADDING_ERROR_HALF
    changed = float((alone - padded).abs().sum()) / 2  # total variation
    if changed <= limit or math.isnan(changed):
        return None
    return f"this model reads their padding, which would move {changed:.1%} of the next token's probability"


def _next_token(
    model: Any, tokenizer: Any, settings: GenerationConfig, rows: list[list[int]], device: torch.device
) -> Tensor:
    """Return the probabilities of the token that follows the first of some prompts, [vocabulary]."""
    inputs = {name: tensor.to(device) for name, tensor in padded_inputs(rows, settings.pad_token_id, model).items()}
    plain = copy.deepcopy(settings)
    plain.update(max_new_tokens=1, min_new_tokens=None, num_beams=1, stop_strings=None)
    plain.update(do_sample=False, temperature=None, top_k=None, top_p=None)
    plain.update(return_dict_in_generate=True, output_logits=True)
    with torch.no_grad():
        found: Tensor = model.generate(**inputs, generation_config=plain, tokenizer=tokenizer).logits[0][0]
    return found.float().softmax(-1).cpu()


def _lengths(tokens: Tensor, begin: int, end_tokens: int | list[int] | None, stops: StoppingCriteria | None) -> Tensor:
    """Return how many new tokens each row has, the last one included: what follows is padding.

    tokens: [rows, n], of which the new ones begin at `begin`; stops: tells rows that end with a stop string.
    """
    ends = torch.tensor([end_tokens] if isinstance(end_tokens, int) else end_tokens or [], dtype=tokens.dtype)
    is_end = torch.isin(tokens[:, begin:], ends)
    if stops is not None:
        for step in range(is_end.shape[1]):
            is_end[:, step] |= stops(tokens[:, : begin + step + 1], None)
    return torch.where(is_end.any(-1), is_end.int().argmax(-1) + 1, is_end.shape[1])


def string_stops(settings: GenerationConfig, tokenizer: Any) -> StoppingCriteria | None:
    """Return the stopping criteria for stop strings.

    Raises ConfigError if the library cannot look for them with a tokenizer.
    """
    if not settings.stop_strings:
        return None
    try:
        return StopStringCriteria(tokenizer, settings.stop_strings)
    except Exception as error:
        raise ConfigError(
            f"generation_config.json has stop_strings={settings.stop_strings}, which transformers cannot look for with "
            f"this tokenizer ({type(error).__name__}: {error}); remove them there"
        ) from error


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
    """Return how many of each prompt's new tokens follow from probabilities that are not finite, [prompts].

    broken: for each token, [rows], where a prompt has several rows if there are beams; what comes behind the prompt's
    end does not count.
    """
    per_token = torch.stack(broken).cpu().view(len(broken), len(lengths), -1).any(-1)  # [tokens, prompts]
    return (per_token & (torch.arange(len(broken))[:, None] < lengths)).sum(0)


def generation_settings(
    base: GenerationConfig, task: GenerateConfig, tokenizer: Any, model: Any = None
) -> GenerationConfig:
    """Return the model's own generation_config, with what the task sets instead.

    Raises: ConfigError for entries with which a prompt has several answers, or none that can be compared.
    """
    settings = copy.deepcopy(base)
    settings.update(**{name: value for name in SETTINGS if (value := getattr(task, name)) is not None})
    settings.return_dict_in_generate = False  # tokens are all that is kept
    if settings.max_new_tokens is None:
        settings.max_new_tokens = DEFAULT_NEW_TOKENS
    if settings.pad_token_id is None or not is_in_vocabulary(settings.pad_token_id, model):
        settings.pad_token_id = _padding_of(tokenizer, settings.eos_token_id, model)
    if settings.num_return_sequences not in (None, 1):
        raise ConfigError(
            f"generation_config.json has num_return_sequences={settings.num_return_sequences}, but a prompt is "
            "continued in one way only; set it to 1 there"
        )
    mode = settings.get_generation_mode()
    if mode not in MODES:
        raise ConfigError(
            f"generation_config.json asks for {mode.value}, which cannot be compared token by token; remove what sets "
            "it there, so that it is greedy, sampling, or a search with beams"
        )
    return settings


def _padding_of(tokenizer: Any, end_tokens: int | list[int] | None, model: Any) -> int | None:
    """Return a token to pad with, which is masked: the tokenizer's, else the end of a text; None if neither exists."""
    ends = [end_tokens] if isinstance(end_tokens, int) else end_tokens or []
    found = [token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, *ends) if token is not None]
    return next((token for token in found if is_in_vocabulary(token, model)), None)


class _Steps(StoppingCriteria):
    """Never stops anything: it is asked after every new token, which is what it is here for."""

    def __init__(self, on_step: OnStep) -> None:
        self.on_step, self.count = on_step, 0

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        self.count += 1
        self.on_step(self.count, None)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
