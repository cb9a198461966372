"""Prompts and lines as tokens of a network: encoded, checked against its vocabulary, and padded."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from qexp.errors import ConfigError, LoadError


def encode_prompts(tokenizer: Any, prompts: list[str]) -> list[list[int]]:
    """Return the tokens of prompts, with the tokenizer's special ones, but none of these twice.

    A prompt out of a chat template begins with the text of the token that the tokenizer puts in front of it.
    """
    encoded = tokenizer(prompts)["input_ids"]
    plain = tokenizer(prompts, add_special_tokens=False, verbose=False)["input_ids"]
    return [once_each(row, own) for row, own in zip(encoded, plain, strict=True)]


def once_each(row: list[int], own: list[int]) -> list[int]:
    """Return a text's tokens without the special ones that were added where the text has the same already.

    row: with special tokens; own: the text's, without.
    """
    before = next((n for n in range(len(row) - len(own) + 1) if row[n : n + len(own)] == own), 0)
    first, last = row[:before], row[before + len(own) :]
    if first and own[: len(first)] == first:
        row = row[before:]
    if last and own[len(own) - len(last) :] == last:
        row = row[: len(row) - len(last)]
    return row


def padded_inputs(rows: list[list[int]], padding: int | None, model: Any) -> dict[str, Tensor]:
    """input_ids and attention_mask of prompts, [prompts, longest]: padded in front, so that the new tokens follow on
    each of them; an encoder's behind.
    """
    ids = [torch.tensor(row, dtype=torch.int64) for row in rows]
    pad = partial(pad_sequence, batch_first=True, padding_side="right" if writes_answers(model) else "left")
    return {"input_ids": pad(ids, padding_value=padding or 0), "attention_mask": pad([*map(torch.ones_like, ids)])}


def encode_lines(model: Any, tokenizer: Any, lines: list[str]) -> dict[str, Tensor]:
    """Return the arguments of a forward for lines of text, [lines, longest], padded behind them.

    A decoder that answers them begins with its start token, so that its outputs are those of the first token to come.
    """
    encoded = tokenizer(lines)
    plain = tokenizer(lines, add_special_tokens=False, verbose=False)["input_ids"]
    for number, (row, own) in enumerate(zip(encoded["input_ids"], plain, strict=True)):
        first = len(row) - len(once_each(row, own))
        for values in encoded.values() if first else ():
            values[number] = values[number][: len(row) - first]
        encoded["input_ids"][number] = once_each(row, own)
    rows = encoded["input_ids"]
    check_tokens(model, tokenizer, rows, "task.inputs")
    encoded = tokenizer.pad(encoded, padding=tokenizer.pad_token is not None, padding_side="right", return_tensors="pt")
    taken = inspect.signature(type(model).forward).parameters
    lengths = sorted({len(row) for row in rows})
    if len(lengths) > 1 and "attention_mask" not in taken:
        raise ConfigError(
            f"task.inputs: {type(model).__name__} takes no attention_mask, so it would read the padding of lines of "
            f"{lengths[0]} to {lengths[-1]} tokens as text; give lines of one length, or a file for each length"
        )
    inputs = {name: tensor for name, tensor in encoded.items() if name in taken}
    start = getattr(model.config, "decoder_start_token_id", None)
    if writes_answers(model) and "decoder_input_ids" in taken and start is not None:
        inputs["decoder_input_ids"] = torch.full((len(lines), 1), start)
    return inputs


def check_tokens(model: Any, tokenizer: Any, rows: Iterable[list[int]], place: str) -> None:
    """Raise LoadError for a token that the network has no embedding for: the tokenizer is another model's."""
    wrong = next((token for row in rows for token in row if not is_in_vocabulary(token, model)), None)
    if wrong is not None:
        raise LoadError(
            f"{place}: the tokenizer in '{tokenizer.name_or_path}' makes token {wrong} of it "
            f"({tokenizer.convert_ids_to_tokens(wrong)!r}), but the network has {vocabulary_size(model)} tokens; put "
            "the files of the model's own tokenizer (tokenizer.json, tokenizer_config.json) there"
        )


def vocabulary_size(model: Any) -> int | None:
    """Return how many tokens a network has embeddings for; None if it has no table of them."""
    try:
        weight = getattr(model.get_input_embeddings(), "weight", None)
    except NotImplementedError:
        return None
    return None if weight is None else int(weight.shape[0])


def is_in_vocabulary(token: int, model: Any) -> bool:
    """Return whether a network has an embedding for a token; a tokenizer may have more tokens."""
    size = None if model is None else vocabulary_size(model)
    return size is None or 0 <= token < size


def writes_answers(model: Any) -> bool:
    return bool(getattr(model.config, "is_encoder_decoder", False))
