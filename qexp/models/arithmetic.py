"""The embedded language model: a small Llama over characters that adds and subtracts (see scripts/train_arithmetic.py).

It is a model of `causal_lm` that brings its own material: problems it was not trained on. The numbers in them are
written from their last digit to their first, `543+870=3240` for 345 + 78 = 423. Prompts are problems up to the equals
sign; the text is whole problems, a line each.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from qexp.config.model import ModelConfig
from qexp.errors import LoadError
from qexp.models import causal_lm

if TYPE_CHECKING:
    from torch import Tensor

    from qexp.config.generate import GenerateConfig

ASSETS = Path(__file__).parents[1] / "assets" / "arithmetic"
HELD_OUT = "held_out.txt"
PROMPT = 8  # characters
PROBLEM = re.compile(r"\d{3}[+-]\d{3}=")


@dataclass(frozen=True)
class ArithmeticConfig(ModelConfig):
    """path: a folder as `save_pretrained` writes it; null is the model that comes with the package. problems: how many
    of the held-out problems are the prompts. revision, reference_path: as of causal_lm; null as for `path`."""

    source: str = "arithmetic"
    problems: int = 500


Config = ArithmeticConfig


class Source(causal_lm.Source):
    """The arithmetic model, with one component, "model"."""

    config: Any
    has_text = True

    @property
    @override
    def folder(self) -> Path:
        return ASSETS if self.config.path is None else super().folder

    @override
    def side_files(self) -> list[Path]:
        return [*super().side_files(), ASSETS / HELD_OUT]

    @override
    def prompts(self, task: GenerateConfig) -> list[str]:
        return list(task.prompt) if task.prompt else [line[:PROMPT] for line in self._lines()[: self.config.problems]]

    @override
    def text(self, path: str | None) -> str:
        return super().text(path) if path is not None else "".join(f"{line}\n" for line in self._lines())

    @override
    def sample_scores(self, outputs: dict[str, Tensor]) -> dict[str, Sequence[float | None]]:
        """answer_accuracy: 1 for a problem that is solved, 0 for another, None for a prompt that is no problem."""
        if "tokens" not in outputs:
            return {}
        lines = zip(self._characters(outputs["prompts"]), self._characters(outputs["tokens"]), strict=True)
        return {
            "answer_accuracy": [
                float(answer == solution(prompt)) if PROBLEM.fullmatch(prompt) else None for prompt, answer in lines
            ]
        }

    def _characters(self, tokens: Tensor) -> list[str]:
        """Return rows of tokens as text without end and special tokens: the tokenizer, but nothing is imported."""
        vocabulary = json.loads((self.folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
        characters = {index: token if len(token) == 1 else "" for token, index in vocabulary.items()}
        return ["".join(characters.get(token, "?") for token in row).strip("\n") for row in tokens.tolist()]

    def _lines(self) -> list[str]:
        try:
            return (ASSETS / HELD_OUT).read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise LoadError(f"{ASSETS / HELD_OUT}: {error.strerror}; reinstall qexp") from error


def solution(prompt: str) -> str:
    """Return the answer to a problem: '3240' to '543+870='."""
    first, second = int(prompt[:3][::-1]), int(prompt[4:7][::-1])
    return f"{first + second if prompt[3] == '+' else first - second:04d}"[::-1]
