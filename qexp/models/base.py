"""What a model source is: where its checkpoints are, how its networks are built, and how it carries out a task.

A source is one module of this package that binds `Config` (a subclass of `config.model.ModelConfig`) and `Source` (a
subclass of `ModelSource`, or of `TextSource`); the module's name is the value of `model.source`. CONTRIBUTING.md has a
complete one. A method that replaces one of these is marked with `typing_extensions.override`, so that mypy finds one
that is misspelt. Methods that need no torch are called by the process that composes experiments.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from qexp.config.plugins import plugin_module, plugin_names
from qexp.errors import ConfigError, choices

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from qexp.checkpoints.checkpoint import Checkpoint
    from qexp.checkpoints.conversion import Conversion
    from qexp.config.generate import GenerateConfig
    from qexp.models.lora import LoraConfig


class ModelSource(ABC):
    """One model, which may have several components (a transformer, a text encoder) with a checkpoint each.

    A source has to define `checkpoints` and `skeleton`, and `generate` if "generate" is among its tasks; the other
    methods do what suits most models, or nothing.
    """

    tasks: tuple[str, ...] = ("forward", "roundtrip")  # those that it can do
    modality: str = "tensors"  # what it generates: "images", "text", or nothing but tensors
    is_pipeline: ClassVar[bool] = False  # whether a saved model is a folder with one for each component
    required_packages: ClassVar[tuple[str, ...]] = ()  # whose versions a result depends on, besides torch

    def __init__(self, config: Any) -> None:
        self.config = config

    # Files, known without torch

    @abstractmethod
    def checkpoints(self) -> dict[str, Path]:
        """Component name -> checkpoint folder or file. Raises LoadError if one is missing."""

    def components(self) -> tuple[str, ...]:
        """The names of the components, in the order in which they are loaded."""
        return tuple(self.checkpoints())

    def quantized_components(self) -> tuple[str, ...]:
        """The components that `backend=` quantizes."""
        return self.components()

    def preset_patterns(self, quantized: Collection[str]) -> tuple[str, ...]:
        """The patterns of `model.skip_modules` that apply where these components are quantized."""
        patterns: tuple[str, ...] = self.config.skip_modules
        return patterns

    def component_config(self, component: str) -> dict[str, Any] | None:
        """The config.json of a component whose checkpoint has none of its own; None if there is none."""
        return None

    def side_files(self) -> list[Path]:
        """All files beside the checkpoints that it reads (a tokenizer's, a scheduler's): they are part of a run's
        key."""
        return []

    def carried_files(self) -> tuple[str, ...]:
        """Names of files in a checkpoint's folder that a saved model takes along (a tokenizer's)."""
        return ()

    def save_side_files(self, folder: Path) -> list[Path]:
        """Write what makes saved components a pipeline into a folder; returns the files."""
        return []

    def adapters(self) -> tuple[LoraConfig, ...]:
        """What is applied to the model besides; its files are part of a run's key."""
        return ()

    # Tasks, checked without torch

    def resolve_task(self, task: GenerateConfig) -> GenerateConfig:
        """The task with this source's defaults, and without what it has no use for."""
        return task

    def check_task(self, task: Any) -> None:  # noqa: B027
        """Raises ConfigError for a task that this model cannot do as it is configured."""

    # The network

    @abstractmethod
    def skeleton(self, component: str, config: dict[str, Any]) -> nn.Module:
        """Build the network that a parsed config.json describes; called where new tensors land on the meta device."""

    def conversion(self, component: str, model: nn.Module, checkpoint: Checkpoint) -> Conversion | None:
        """The function that turns tensors in the layout of the model's authors into the model's own
        (`checkpoints/conversion.py`); None if every checkpoint has the model's names."""
        return None

    def skip_modules(self, component: str, model: nn.Module) -> tuple[str, ...]:
        """Patterns of the modules that stay unquantized, whatever the settings say."""
        return ()

    def block_lists(self, model: nn.Module) -> list[str]:
        """Dotted names of the module lists whose items are offloaded block by block."""
        from qexp.offloading.grouping import outermost_lists

        return outermost_lists(model)

    def adapt(self, component: str, model: nn.Module, dtype: torch.dtype) -> None:  # noqa: B027
        """Apply the adapters to a component that is loaded and computes in `dtype`."""

    # Running it

    def check_run(self, models: Mapping[str, nn.Module], task: Any) -> None:  # noqa: B027
        """Raises ConfigError or LoadError for what cannot be run, given the skeletons: no weight is read yet."""

    def number_of_steps(self, models: Mapping[str, nn.Module], task: GenerateConfig) -> int | None:
        """How often `generate` will call `on_step`; None if that is not known."""
        return task.num_inference_steps

    def limit_samples(self, task: GenerateConfig, count: int) -> GenerateConfig:
        """The task with its first `count` samples, by which a model is calibrated."""
        return replace(task, num_images=count)

    def forward_inputs(self, model: nn.Module, lines: list[str]) -> dict[str, Tensor]:
        """The arguments of the network for lines of text, [lines, longest]. Raises ConfigError without a tokenizer."""
        raise ConfigError(
            f"task.inputs is text, and model.source={self.config.source} has no tokenizer to read it with; give "
            "tensors (.safetensors with the names of forward's arguments, or .npy)"
        )

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
        raise NotImplementedError(f"{type(self).__module__} has 'generate' among its tasks, and no such method")

    def scores(self, outputs: dict[str, Tensor]) -> dict[str, float | None]:
        """The source's own quality numbers of saved outputs; None where one is undefined."""
        return {}


class TextSource(ModelSource):
    """A model of text."""

    modality = "text"
    has_text: bool = False  # whether it brings a text to measure perplexity on

    @property
    @abstractmethod
    def begin_token(self) -> int | None:
        """The token that a text begins with, None if there is none."""

    @abstractmethod
    def prompts(self, task: GenerateConfig) -> list[str]:
        """The texts that `generate` goes on from. Raises ConfigError if there are none."""

    @abstractmethod
    def text(self, path: str | None) -> str:
        """The text in a file, or its own. Raises ConfigError if there is none."""

    @abstractmethod
    def encode(self, text: str) -> Tensor:
        """The tokens of a text, [n], without special ones."""

    @abstractmethod
    def decode(self, tokens: Tensor) -> list[str]:
        """The texts of rows of tokens, [n, length], without special ones."""


def load_source(config: Any) -> ModelSource:
    """The model source that `config.source` names. Raises ConfigError, with the choices, if there is none."""
    names = plugin_names("model")
    if config.source not in names:
        raise ConfigError(f"model.source={config.source!r} is unknown; use {choices(names)}")
    source: ModelSource = plugin_module("model", config.source).Source(config)
    return source
