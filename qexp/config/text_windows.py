"""Split a text into windows of a language model: tokens per window, and tokens scored per window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qexp.errors import ConfigError

LONGEST = 2048  # tokens of a window, where none is asked for
POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")  # words of config.json


def window_and_stride(
    longest: int | None, window: int | None, stride: int | None, *, has_begin: bool
) -> tuple[int, int]:
    """Return (tokens of the text in a window, tokens that it scores).

    longest: the positions of the model, if known. has_begin: whether a begin token takes one position.
    Raises: ConfigError if a window exceeds the positions, or if tokens would not be scored.
    """
    if longest is not None and window is not None and window > longest:
        raise ConfigError(
            f"task.window={window} is more than the {longest} positions of this model; use at most {longest}, or null"
        )
    size = window or min(longest or LONGEST, LONGEST)
    tokens = size - 1 if has_begin else size
    scored = stride or max(tokens // 2, 1)
    if scored > tokens:
        raise ConfigError(
            f"task.stride={scored} leaves tokens out: it must be at most {tokens}, with task.window={size}"
        )
    return tokens, scored


def positions(config: Mapping[str, Any]) -> int | None:
    """Return the text model's number of positions from a parsed config.json, or None."""
    text = config.get("text_config")
    own = text if isinstance(text, Mapping) else config
    found = next((own[name] for name in POSITIONS if type(own.get(name)) is int), None)
    return found if found is not None and found > 0 else None
