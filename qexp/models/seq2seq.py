"""Sequence-to-sequence models of transformers (T5, BART, Marian, …): any architecture of AutoModelForSeq2SeqLM.

A prompt goes into the encoder, and what the decoder writes is the answer; everything else is as with causal language
models. There is no perplexity: it would be of targets, given prompts, and a text alone has none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from typing_extensions import override

from qexp.errors import ConfigError
from qexp.models import causal_lm


@dataclass(frozen=True)
class Seq2SeqConfig(causal_lm.CausalLMConfig):
    """As of causal_lm."""

    source: str = "seq2seq"


Config = Seq2SeqConfig


class Source(causal_lm.Source):
    """A sequence-to-sequence model with one component, "model"."""

    tasks: tuple[str, ...] = ("generate", "forward", "roundtrip")
    network_class = "AutoModelForSeq2SeqLM"
    padding_side = "right"

    @override
    def check_task(self, task: Any) -> None:
        if task.name == "generate" and task.text is not None:
            raise ConfigError(
                f"task.text={task.text} is a text to measure perplexity on, which model.source=seq2seq has not: its "
                "decoder writes answers to prompts; leave it out, and compare answers (quality/exact_match)"
            )
        super().check_task(task)
