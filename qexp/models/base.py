"""What a model source is: where its checkpoints are, how its networks are built, and how it answers a task.

A source is one module of this package that declares `Config` (a frozen dataclass, without torch) and `Source`
(the protocol below); the module's name is the value of `model.source`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from qexp.config.plugins import plugin_module, plugin_names
from qexp.errors import ConfigError, choices

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from qexp.config.generate import GenerateConfig


class ModelSource(Protocol):
    """One model, which may have several components (a transformer, a text encoder) with a checkpoint each.

    What a source may have besides:

    - `quantized_components()`: those that `backend=` is for; without it, all;
    - `component_config(component)`: the config.json of a checkpoint that has none of its own, else None;
    - `conversion(component, model, checkpoint)`: the function that turns a dict of tensors in another layout (that of
      the model's authors) into one with the model's names, or None; see checkpoints/conversion.py;
    - `skip_modules(component, model)`: the modules that it leaves unquantized, whatever the settings say;
    - `resolve_task(task)`: the task with this source's defaults, and without what it has no use for;
    - `check_task(task)`: raises ConfigError for a task that this model cannot do as it is configured; needs no torch;
    - `check_run(models, task)`: the same with skeletons of all components, before their weights are read;
    - `number_of_steps(models, task)`: how often `generate` will call `on_step`, None if that is not known;
    - `carried_files()`: names of files in a checkpoint's folder that a saved model takes along (a tokenizer's);
    - `forward_inputs(lines)`, of text: the arguments of the network for lines of text, for `task=forward`;
    - `adapters()`: what is applied to the model besides, each with a `file` and a `weight`; `adapt(component, model,
      dtype)`: applies them to a component that is loaded;
    - `save_side_files(folder)`: puts the side files, and what else makes the saved components a whole, into a folder,
      and returns the files.
    """

    tasks: tuple[str, ...]  # those it can do
    modality: str  # "images" or "text": what it generates

    def __init__(self, config: Any) -> None: ...

    def components(self) -> tuple[str, ...]:
        """The names of the components, in the order in which they are loaded. Needs no torch."""

    def checkpoints(self) -> dict[str, Path]:
        """Component name -> checkpoint folder or file. Needs no torch. Raises LoadError if one is missing."""

    def side_files(self) -> list[Path]:
        """All files beside the checkpoints that it reads (a tokenizer's, a scheduler's): they are part of a run's key.
        Needs no torch."""

    def skeleton(self, component: str, config: dict[str, Any]) -> nn.Module:
        """The network that a parsed config.json describes; called where new tensors land on the meta device."""

    def block_lists(self, component: str) -> list[str]:
        """Dotted names of the module lists whose items are offloaded block by block."""

    def generate(
        self,
        models: dict[str, nn.Module],
        task: GenerateConfig,
        *,
        seed: int,
        device: torch.device,
        on_step: Callable[[int, Tensor | None], None],
    ) -> dict[str, Tensor]:
        """Samples as cpu tensors.

        Images: "images" [n, channels, height, width] fp32 in [-1, 1] and "labels" [n]; a value that was not finite is
        NaN. `on_step(step, state)` is called after each integration step, step = 1, 2, ...; states are of one shape.
        Text: "tokens" [prompts, longest], the new ones, "lengths" [prompts], how many of them count, and "nonfinite"
        [prompts], how many of those follow from probabilities that are not finite.
        `on_step(step, None)` is called after each new token of a batch, step = 1, 2, ...
        """

    def scores(self, outputs: dict[str, Tensor]) -> dict[str, float | None]:
        """The source's own quality numbers of saved outputs; None where one is undefined."""


class TextSource(ModelSource, Protocol):
    """A model of text."""

    has_text: bool  # whether it brings a text to measure perplexity on

    @property
    def begin_token(self) -> int | None:
        """The token that a text begins with, None if there is none."""

    def prompts(self, task: GenerateConfig) -> list[str]:
        """The texts that `generate` goes on from."""

    def text(self, path: str | None) -> str:
        """The text in a file, or its own. Raises ConfigError if there is none."""

    def encode(self, text: str) -> Tensor:
        """The tokens of a text, [n], without special ones."""

    def decode(self, tokens: Tensor) -> list[str]:
        """The texts of rows of tokens, [n, length], without special ones."""


def load_source(config: Any) -> ModelSource:
    """The model source that `config.source` names. Raises ConfigError, with the choices, if there is none."""
    names = plugin_names("model")
    if config.source not in names:
        raise ConfigError(f"model.source={config.source!r} is unknown; use {choices(names)}")
    return cast(ModelSource, plugin_module("model", config.source).Source(config))
