"""The base classes of model sources: find checkpoints, build networks, carry out tasks.

A source is one module of this package that binds `Config` (a subclass of `config.model.ModelConfig`) and `Source` (a
subclass of `ModelSource`, or of `TextSource`); the module's name is the value of `model.source`. CONTRIBUTING.md has a
complete one. A method that replaces one of these is marked with `typing_extensions.override`, so that mypy finds one
that is misspelt. Methods that need no torch are called by the process that composes experiments.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
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

OnStep = Callable[[int, "Tensor | None"], None]  # (number of the step, the state after it)


class ModelSource(ABC):
    """One model, which may have several components (a transformer, a text encoder) with a checkpoint each.

    A source must define `checkpoints` and `skeleton`, and `generate` if "generate" is among its tasks; the other
    methods have defaults that suit most models, or do nothing.
    """

    tasks: tuple[str, ...] = ("forward", "roundtrip")  # supported tasks
    modality: str = "tensors"  # what it generates: "images", "text", or nothing but tensors
    is_pipeline: ClassVar[bool] = False  # whether a saved model is a folder with one for each component
    required_packages: ClassVar[tuple[str, ...]] = ()  # whose versions a result depends on, besides torch
    imports: ClassVar[tuple[str, ...]] = ()  # modules that building and running its networks imports

    def __init__(self, config: Any) -> None:
        self.config = config

    # Files, known without torch

    @abstractmethod
    def checkpoints(self) -> dict[str, Path]:
        """Component name -> checkpoint folder or file. Raises LoadError if one is missing."""

    def components(self) -> tuple[str, ...]:
        """Return the names of the components, in loading order."""
        return tuple(self.checkpoints())

    def quantized_components(self) -> tuple[str, ...]:
        """Return the components that `backend=` quantizes."""
        return self.components()

    def preset_patterns(self, quantized: Collection[str]) -> tuple[str, ...]:
        """Return the patterns of `model.skip_modules` that apply if these components are quantized."""
        return self.config.skip_modules

    def component_config(self, component: str) -> dict[str, Any] | None:
        """Return the config of a component for checkpoints without a config.json; None if it has none."""
        return None

    def side_files(self) -> list[Path]:
        """Return all files that it reads besides checkpoints (tokenizer, scheduler); they are part of a run's key."""
        return []

    def carried_files(self) -> tuple[str, ...]:
        """Return the names of files (of a tokenizer) that are copied from a checkpoint's folder to a saved model."""
        return ()

    def save_side_files(self, folder: Path) -> list[Path]:
        """Write the files that make saved components a pipeline; return them."""
        return []

    def adapters(self) -> tuple[LoraConfig, ...]:
        """Return the adapters applied to the model; their files are part of a run's key."""
        return ()

    # Tasks, checked without torch

    def resolve_task(self, task: GenerateConfig) -> GenerateConfig:
        """Return the task with this source's defaults, without fields that it does not use."""
        return task

    def check_task(self, task: Any) -> None:  # noqa: B027
        """Raise ConfigError for a task that this model cannot do as configured."""

    def library_classes(self) -> tuple[str, ...]:
        """Return classes of this very model whose modules its libraries import when asked for them.

        Each as package::Class; one that the package has not is an error of the load, which says why.
        """
        return ()

    # The network

    @abstractmethod
    def skeleton(self, component: str, config: dict[str, Any]) -> nn.Module:
        """Build the network of a parsed config.json; called with the meta device as default."""

    def conversion(self, component: str, model: nn.Module, checkpoint: Checkpoint) -> Conversion | None:
        """Return the function that converts the authors' tensor layout to the model's (`checkpoints/conversion.py`).

        None if every checkpoint has the model's names.
        """
        return None

    def skip_modules(self, component: str, model: nn.Module) -> tuple[str, ...]:
        """Return the patterns of modules that always stay unquantized."""
        return ()

    def block_lists(self, model: nn.Module) -> list[str]:
        """Return the dotted names of the module lists that hold blocks for block offloading."""
        from qexp.offloading.grouping import outermost_lists

        return outermost_lists(model)

    def adapt(self, component: str, model: nn.Module, dtype: torch.dtype) -> None:  # noqa: B027
        """Apply the adapters to a loaded component that computes in `dtype`."""

    # Running it

    def check_run(self, models: Mapping[str, nn.Module], task: Any) -> None:  # noqa: B027
        """Raise ConfigError or LoadError for a task that the skeletons cannot run, before weights are read."""

    def number_of_steps(self, models: Mapping[str, nn.Module], task: GenerateConfig) -> int | None:
        """Return how often `generate` calls `on_step`, or None if unknown."""
        return task.num_inference_steps

    def limit_samples(self, task: GenerateConfig, count: int) -> GenerateConfig:
        """Return the task with its first `count` samples, for calibration."""
        return replace(task, num_images=count)

    def forward_inputs(self, model: nn.Module, lines: list[str]) -> dict[str, Tensor]:
        """Return the network's inputs for lines of text, [lines, longest]. Raises ConfigError without a tokenizer."""
        raise ConfigError(
            f"task.inputs is text, but model.source={self.config.source} has no tokenizer; give tensors (.safetensors "
            "with the names of forward's arguments, or .npy)"
        )

    def generate(
        self, models: dict[str, nn.Module], task: GenerateConfig, *, seed: int, device: torch.device, on_step: OnStep
    ) -> dict[str, Tensor]:
        """Generate samples as CPU tensors.

        Images: "images" [n, channels, height, width] fp32 in [-1, 1] and "labels" [n]; a value that was not finite is
        NaN. `on_step(step, state)` is called after each integration step, step = 1, 2, ...; states are of one shape.
        Text: "tokens" [prompts, longest], the new ones, "lengths" [prompts], how many of them count, and "nonfinite"
        [prompts], how many of those follow from probabilities that are not finite.
        `on_step(step, None)` is called after each new token of a batch, step = 1, 2, ...
        """
        raise NotImplementedError(f"{type(self).__module__} has 'generate' among its tasks, and no such method")

    def scores(self, outputs: dict[str, Tensor]) -> dict[str, float | None]:
        """Return the source's own quality scores of saved outputs; None where one is undefined.

        By default the means of `sample_scores`, of those that are defined.
        """
        by_name = {name: [one for one in of if one is not None] for name, of in self.sample_scores(outputs).items()}
        return {name: sum(defined) / len(defined) if defined else None for name, defined in by_name.items()}

    def sample_scores(self, outputs: dict[str, Tensor]) -> dict[str, Sequence[float | None]]:
        """The values whose means some of `scores` are, one for each image or prompt; None where one is undefined."""
        return {}


class TextSource(ModelSource):
    """A model of text."""

    modality = "text"
    has_text: bool = False  # whether it brings a text to measure perplexity on

    @property
    @abstractmethod
    def begin_token(self) -> int | None:
        """Return the token that begins a text, or None."""

    @abstractmethod
    def prompts(self, task: GenerateConfig) -> list[str]:
        """Return the texts that `generate` continues. Raises ConfigError if there are none."""

    @abstractmethod
    def text(self, path: str | None) -> str:
        """Return the text of a file, or the source's own. Raises ConfigError if there is none."""

    @abstractmethod
    def encode(self, text: str) -> Tensor:
        """Return the tokens of a text, [n], without special tokens."""

    def token_bytes(self, text: str) -> Tensor | None:
        """Return how many bytes of the text, in UTF-8, each token of `encode` stands for, [n]; None if unknown."""
        return None

    @abstractmethod
    def decode(self, tokens: Tensor) -> list[str]:
        """Return the texts of rows of tokens, [n, length], without special tokens."""


def load_source(config: Any) -> ModelSource:
    """Return the model source named by `config.source`. Raises ConfigError with the choices for an unknown one."""
    names = plugin_names("model")
    if config.source not in names:
        raise ConfigError(f"model.source={config.source!r} is unknown; use {choices(names)}")
    return plugin_module("model", config.source).Source(config)
