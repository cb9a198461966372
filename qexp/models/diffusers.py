"""Pipelines of diffusers, images and video: a folder as `save_pretrained` writes it and hubs hold it.

Every component with weights is loaded by us, one after the other: those in `model.quantize` (the denoiser, unless it
says otherwise) as `backend=` says, the others as they are. Schedulers, tokenizers and processors are opened by their
libraries, and the pipeline is diffusers' own class around all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from qexp.checkpoints.checkpoint import read_object
from qexp.checkpoints.pipeline_folder import INDEX, PipelineFolder, open_pipeline
from qexp.config.dataclass_io import check_known, convert, field_types
from qexp.config.generate import GenerateConfig, for_pipelines
from qexp.config.model import ModelConfig
from qexp.errors import ConfigError, LoadError, choices, did_you_mean
from qexp.hub.download import local_folder
from qexp.models.base import ModelSource, OnStep
from qexp.models.lora import LoraConfig, Updates, lora_configs, lora_with_paths, read_updates
from qexp.system.screen import say

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from qexp.checkpoints.checkpoint import Checkpoint
    from qexp.checkpoints.conversion import Conversion

LEGACY = ("Transformer2DModel",)  # a general class of old, which stands for several
DENOISERS = ("transformer", "transformer_2", "unet")
DEFAULTED = (  # fields of a task that a preset may give
    "num_inference_steps", "guidance_scale", "true_cfg_scale", "height", "width", "num_frames", "max_sequence_length",
    "negative_prompt", "pipeline_arguments",
)  # fmt: skip


@dataclass(frozen=True)
class DiffusersConfig(ModelConfig):
    """path: the folder of a pipeline, the one with model_index.json, or its name on a hub (user/name); revision: the
    branch or commit there; variant: of the weights' files ("fp16" is *.fp16.safetensors).
    quantize: the components that `backend` is for; null is the denoiser: transformer and transformer_2, or unet.
    checkpoints: a component's weights from elsewhere, a folder, a .safetensors or a .gguf file, in diffusers' or their
    authors' layout.
    reference_path: the unquantized pipeline to compare with where `path` is quantized already.
    lora: a file or folder of a LoRA, {path, weight, component}, or a list of those: applied to this pipeline and its
    reference; component: transformer_2, say, in a pipeline that has two.
    task_defaults: what fields of the task are where they are null, such as num_inference_steps."""

    source: str = "diffusers"
    variant: str | None = None
    quantize: tuple[str, ...] | None = None
    checkpoints: dict[str, str] = field(default_factory=dict)
    lora: Any = None
    task_defaults: dict[str, Any] = field(default_factory=dict)

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        lora_configs(self.lora)
        for name in self.task_defaults:
            place = f"model.task_defaults.{name}"
            check_known(place, str(name), list(DEFAULTED))
            convert(field_types(GenerateConfig)[name], self.task_defaults[name], place)

    def ignored_fields(self) -> set[str]:
        """Files count by their content, what is quantized by the components' backends, and defaults as the task has
        them.
        """
        return {"revision", "variant", "checkpoints", "quantize", "lora", "task_defaults"}

    @property
    @override
    def has_original(self) -> bool:
        return True  # the folder's own weights are one where `checkpoints` are quantized

    @override
    def unquantized(self) -> DiffusersConfig:
        """Return the pipeline to compare with where something is quantized in this one's checkpoints."""
        if self.reference_path is not None:
            return replace(
                self, path=self.reference_path, revision=None, variant=None, checkpoints={}, reference_path=None
            )
        return replace(self, checkpoints={})  # the folder's own weights

    @override
    def with_paths(self, absolute: Callable[[str], str]) -> DiffusersConfig:
        checkpoints = {name: absolute(path) for name, path in self.checkpoints.items()}
        return replace(self, checkpoints=checkpoints, lora=lora_with_paths(self.lora, absolute))


Config = DiffusersConfig


class Source(ModelSource):
    """A pipeline, with a component for each of its models."""

    config: DiffusersConfig

    tasks: tuple[str, ...] = ("generate", "roundtrip", "sensitivity")
    modality = "images"
    is_pipeline = True
    required_packages = ("diffusers", "transformers", "tokenizers")
    imports = (
        *("diffusers.models.modeling_utils", "diffusers.pipelines.pipeline_utils", "transformers.modeling_utils"),
        *("diffusers.guiders", "qexp.models.pipeline_building:name_schedulers", "qexp.models.pipeline_call"),
    )

    def __init__(self, config: DiffusersConfig) -> None:
        super().__init__(config)
        self._pipeline: Any = None
        self._updates: Updates = {}

    @cached_property
    def folder(self) -> PipelineFolder:
        """Raises: ConfigError or LoadError if there is no pipeline."""
        if self.config.path is None:
            raise ConfigError(
                "model.path=null, but this model needs a pipeline; set model.path to the folder with model_index.json, "
                "or to a hub's user/name"
            )
        return open_pipeline(local_folder(self.config.path), f"model.path={self.config.path}")

    @override
    def components(self) -> tuple[str, ...]:
        for name in self.config.checkpoints:
            _check_component(f"model.checkpoints.{name}", name, self.folder.models)
        return self.folder.models

    @override
    def library_classes(self) -> tuple[str, ...]:
        """Return the classes of the pipeline and of its components, but for those with code of their own."""
        named = [("diffusers", self.folder.index.get("_class_name")), *self.folder.parts.values()]
        known = [one for one in named if one[0] in ("diffusers", "transformers") and isinstance(one[1], str)]
        return tuple(f"{library}::{name}" for library, name in known)

    @override
    def quantized_components(self) -> tuple[str, ...]:
        """Return the components that `backend` quantizes. Raises ConfigError for one that the pipeline lacks."""
        known = self.components()
        if self.config.quantize is None:
            names = tuple(name for name in known if name in DENOISERS)
            if not names:
                raise ConfigError(
                    f"model.quantize=null is the denoiser, but this pipeline has neither {choices(DENOISERS)}; set "
                    f"model.quantize to some of its components: {choices(known)}"
                )
            return names
        for name in self.config.quantize:
            _check_component(f"model.quantize: {name!r}", name, known)
        return tuple(name for name in known if name in self.config.quantize)

    @override
    def preset_patterns(self, quantized: Collection[str]) -> tuple[str, ...]:
        """Return a preset's patterns, which are for the denoiser, if it is quantized."""
        return self.config.skip_modules if any(name in DENOISERS for name in quantized) else ()

    @override
    def checkpoints(self) -> dict[str, Path]:
        """Component -> its folder or file."""
        own = {name: Path(path).expanduser() for name, path in self.config.checkpoints.items()}
        for name, path in own.items():
            if not path.exists():
                raise ConfigError(
                    f"model.checkpoints.{name}={path} does not exist; give a folder with config.json and safetensors, "
                    "or a .safetensors or .gguf file"
                )
        variant = self.config.variant
        found = {name: own.get(name) or self.folder.weights(name, variant) for name in self.components()}
        if variant is not None and all(path == self.folder.path / name for name, path in found.items()):
            raise LoadError(
                f"model.variant={variant}: no component of '{self.folder.path}' has files of this variant, such as "
                f"model.{variant}.safetensors; leave it out"
            )
        return found

    @override
    def component_config(self, component: str) -> dict[str, Any] | None:
        """Return the pipeline's config for a file of weights from elsewhere that has no config of its own."""
        own = self.config.checkpoints.get(component)
        if own is None or not Path(own).expanduser().is_file():
            return None
        config = read_object(self.folder.path / component / "config.json")
        return {name: value for name, value in config.items() if name != "quantization_config"}

    @override
    def skeleton(self, component: str, config: dict[str, Any]) -> nn.Module:
        """Build the network of the class in model_index.json.

        Raises: LoadError for a class that is not installed, or weights from elsewhere of another class.
        """
        stated, expected = config.get("_class_name"), self.folder.parts[component][1]
        fits = stated in (None, expected, *LEGACY) or expected in LEGACY
        if component in self.config.checkpoints and not fits:
            raise LoadError(
                f"model.checkpoints.{component}={self.config.checkpoints[component]} is a {stated}, but the pipeline "
                f"needs a {expected}; give weights of that class"
            )
        variant, folder = self.config.variant, self.folder.path / component
        if variant is not None and self.checkpoints()[component] == folder:
            why = f"'{folder}' has no files of model.variant={variant}; read are those without a variant"
            say(f"warning: {component}: {why}")
        return _building().network(self.folder, component, config)

    @override
    def conversion(self, component: str, model: nn.Module, checkpoint: Checkpoint) -> Conversion | None:
        """Return the conversion of tensor names: transformers' rules, or diffusers' for a single file."""
        from qexp.models.folder import library_conversion

        return library_conversion(model, checkpoint)

    @override
    def block_lists(self, model: nn.Module) -> list[str]:
        from qexp.models.transformers_networks import block_lists

        return block_lists(model) or super().block_lists(model)

    @override
    def side_files(self) -> list[Path]:
        """Return the files that a result depends on besides weights: the index, schedulers, tokenizers."""
        return self.folder.side_files()

    @override
    def save_side_files(self, folder: Path) -> list[Path]:
        """Copy the files without weights to the folder of a saved pipeline; return them."""
        from qexp.system.files import write_bytes

        sources = sorted(self.side_files(), key=lambda file: file.name == INDEX)  # which says that all is there
        targets = [folder / file.relative_to(self.folder.path) for file in sources]
        for source, target in zip(sources, targets, strict=True):
            write_bytes(target, source.read_bytes())
        return targets

    @override
    def resolve_task(self, task: GenerateConfig) -> GenerateConfig:
        """Return the task with this pipeline's defaults, without fields that pipelines do not use."""
        now = {name: getattr(task, name) for name in self.config.task_defaults}
        unset = {name: self.config.task_defaults[name] for name, own in now.items() if not own and own != 0}
        return for_pipelines(replace(task, **unset).resolved())

    @override
    def check_task(self, task: Any) -> None:
        """Raise ConfigError for a task without a prompt, or a LoRA that is not there or of no use."""
        if task.name in ("generate", "sensitivity"):
            self.prompts(task)
        for lora in self.adapters():
            lora.files()
            if lora.component is not None:
                _check_component(f"model.lora: component={lora.component}", lora.component, self.components())
            if task.name == "roundtrip":
                raise ConfigError(
                    f"model.lora={lora.path} with task=roundtrip, which compares the model's own weights; leave it out"
                )

    def prompts(self, task: GenerateConfig) -> list[str]:
        if not task.prompt:
            raise ConfigError(
                "task.prompt=null, but a pipeline needs prompts; give a text or a list: "
                "task.prompt='[A red cube,A tree]', or task.prompt=@file with one per line"
            )
        return list(task.prompt)

    def pipeline(self, models: Mapping[str, nn.Module]) -> Any:
        """Build diffusers' pipeline around models, which may be skeletons that are loaded in place later."""
        if self._pipeline is None or any(getattr(self._pipeline, name) is not model for name, model in models.items()):
            self._pipeline = _building().assemble(self.folder, models)
        return self._pipeline

    @override
    def check_run(self, models: Mapping[str, nn.Module], task: GenerateConfig) -> None:
        """Raise ConfigError or LoadError for a task that this pipeline cannot do, before weights are read."""
        from qexp.models.pipeline_building import pipeline_class
        from qexp.models.pipeline_call import check_arguments

        check_arguments(self.pipeline(models), task)
        if self.adapters():
            self._updates = read_updates(self.adapters(), pipeline_class(self.folder), models)

    @override
    def adapters(self) -> tuple[LoraConfig, ...]:
        return lora_configs(self.config.lora)

    @override
    def adapt(self, component: str, model: nn.Module, dtype: torch.dtype) -> None:
        """Apply the LoRAs to a loaded component; `check_run` has read them."""
        from qexp.models.lora_layers import apply_updates

        apply_updates(model, self._updates.get(component, {}), dtype)

    @override
    def limit_samples(self, task: GenerateConfig, count: int) -> GenerateConfig:
        return replace(task, prompt=tuple(self.prompts(task)[:count]))

    @override
    def number_of_steps(self, models: Mapping[str, nn.Module], task: GenerateConfig) -> int | None:
        from qexp.models.pipeline_call import number_of_steps

        return number_of_steps(self.pipeline(models), task, len(self.prompts(task)))

    @override
    def generate(
        self, models: dict[str, nn.Module], task: GenerateConfig, *, seed: int, device: torch.device, on_step: OnStep
    ) -> dict[str, Tensor]:
        """Generate images of all prompts: see `pipeline_call.run_pipeline`."""
        from qexp.models.pipeline_call import run_pipeline

        return run_pipeline(self.pipeline(models), self.prompts(task), task, seed=seed, on_step=on_step)


def _building() -> Any:
    """Import the module that imports diffusers, without its warnings."""
    from qexp.system.imports import quiet

    with quiet():
        from qexp.models import pipeline_building
    return pipeline_building


def _check_component(place: str, name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        raise ConfigError(
            f"{place} is not a component of this pipeline{did_you_mean(name, known)}; use {choices(known)}"
        )
