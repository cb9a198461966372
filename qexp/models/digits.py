"""The embedded model: a class-conditional diffusion transformer on handwritten digits (see `digits_network.py`).

Sampling integrates dx/dt = v(x, t, label) from noise at t = 1 to an image at t = 0 in equal Euler steps. The state
stays in fp32 whatever the network computes in, and the noise comes from the CPU generator, so that a reference and
a candidate start from the same bits on any device. Guidance extrapolates from the unconditional velocity,
v = v_null + scale * (v_label - v_null), with both in one forward of twice the batch.

Sources: arXiv:2210.02747 (flow matching), arXiv:2207.12598 (classifier-free guidance).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from qexp.config.generate import GenerateConfig, for_images
from qexp.config.model import ModelConfig
from qexp.errors import LoadError, choices
from qexp.hub.download import local_folder
from qexp.models.base import ModelSource, OnStep

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from qexp.models.digits_network import DigitsClassifier

ASSETS = Path(__file__).parents[1] / "assets" / "digits"
CLASSIFIER = ASSETS / "classifier.safetensors"
SAVED_FIELDS = ("quantization_config", "torch_dtype", "dtype")  # of the loader, not of the architecture


@dataclass(frozen=True)
class DigitsModelConfig(ModelConfig):
    """path: a folder with config.json and safetensors or a .gguf file, or such a file, or user/name of a hub's
    repository, of which revision is a branch, tag or commit (null: main); null is the checkpoint that comes with the
    package.
    reference_path: the unquantized checkpoint to compare with where `path` is quantized already; null as for `path`."""

    source: str = "digits"


Config = DigitsModelConfig


class Source(ModelSource):
    """The digits model, with one component, "transformer"."""

    tasks = ("generate", "forward", "roundtrip", "sensitivity")
    modality = "images"

    @override
    def components(self) -> tuple[str, ...]:
        return ("transformer",)

    @override
    def resolve_task(self, task: GenerateConfig) -> GenerateConfig:
        """Return the task with this model's defaults, and only the fields that it uses."""
        return for_images(task)

    @override
    def checkpoints(self) -> dict[str, Path]:
        """Return the transformer's folder or file. Raises LoadError for a folder without config.json or weights."""
        folder = ASSETS if self.config.path is None else local_folder(self.config.path)
        place = f"model.path={self.config.path!r}" if self.config.path else f"the embedded checkpoint in {folder}"
        remedy = "set model.path to a folder with both, to a .gguf file, or to null for the embedded model"
        if not folder.exists():
            raise LoadError(f"{place}: it does not exist; {remedy}")
        if folder.is_file():
            return {"transformer": folder}
        if not (folder / "config.json").is_file():
            raise LoadError(f"{place}: no file config.json there; {remedy}")
        if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.gguf")):
            raise LoadError(f"{place}: no *.safetensors or *.gguf file there; {remedy}")
        return {"transformer": folder}

    @override
    def side_files(self) -> list[Path]:
        """Return the files for scoring images."""
        return [CLASSIFIER]

    @override
    def skeleton(self, component: str, config: dict[str, Any]) -> nn.Module:
        """Build a `DigitsTransformer` of the stored architecture. Raises LoadError for an invalid config."""
        from qexp.models.digits_network import DigitsTransformer

        return DigitsTransformer(_architecture(config))

    @override
    def generate(
        self, models: dict[str, nn.Module], task: GenerateConfig, *, seed: int, device: torch.device, on_step: OnStep
    ) -> dict[str, Tensor]:
        """Generate digits 0..9 in turn from the noise of `seed`; the module's docstring describes the integration."""
        import torch

        task = self.resolve_task(task)
        count, steps, guidance_scale = task.num_images, task.num_inference_steps, task.guidance_scale
        assert count is not None and steps is not None and guidance_scale is not None  # resolved
        labels = torch.arange(count, device="cpu") % 10
        generator = torch.Generator("cpu").manual_seed(seed)
        noise = torch.randn(count, 1, 8, 8, generator=generator, device="cpu")
        state, classes = noise.to(device), labels.to(device)
        with torch.no_grad():
            for step in range(1, steps + 1):
                t = torch.full((count,), 1 - (step - 1) / steps, device=device)
                velocity = _velocity(models["transformer"], state, t, classes, guidance_scale)
                state = state - velocity / steps
                on_step(step, state)
        images = state.cpu()
        images = images.clamp(-1, 1).masked_fill(~images.isfinite(), torch.nan)  # clamp would turn inf into 1
        return {"images": images, "labels": labels}

    @override
    def scores(self, outputs: dict[str, Tensor]) -> dict[str, float | None]:
        """Compute the embedded classifier's accuracy, and the Fréchet distance of its features to real digits.

        An image with a value that is not finite counts as wrong and leaves the Fréchet distance undefined, as does
        a single image.
        """
        import torch

        from qexp.metrics.frechet import frechet_distance, mean_and_covariance

        images, distance = outputs["images"].float(), None
        if len(images) > 1 and bool(images.isfinite().all()):
            classifier, *real = _classifier()
            with torch.no_grad():
                features = classifier.features(images)
            distance = frechet_distance(*mean_and_covariance(features), *real)
        return {**super().scores(outputs), "frechet_distance": distance}

    @override
    def sample_scores(self, outputs: dict[str, Tensor]) -> dict[str, Sequence[float | None]]:
        """class_accuracy: 1 for an image that is recognized as its label, else 0."""
        import torch

        images = outputs["images"].float()
        with torch.no_grad():
            is_recognized = _classifier()[0](images).argmax(-1) == outputs["labels"]
        return {"class_accuracy": (is_recognized & images.flatten(1).isfinite().all(-1)).double().tolist()}


def _velocity(model: nn.Module, state: Tensor, t: Tensor, labels: Tensor, guidance_scale: float) -> Tensor:
    """Return the guided velocity in fp32: state [n, 1, 8, 8], t [n], labels [n] -> [n, 1, 8, 8]."""
    import torch

    from qexp.models.digits_network import NULL_LABEL

    if guidance_scale == 1:
        return model(state, t, labels).float()
    both = torch.cat([labels, torch.full_like(labels, NULL_LABEL)])
    velocity, null = model(torch.cat([state, state]), torch.cat([t, t]), both).float().chunk(2)
    return null + guidance_scale * (velocity - null)


def _architecture(config: dict[str, Any]) -> Any:
    """Return the `DigitsConfig` in a parsed config.json, checked as far as the constructor relies on it."""
    from qexp.models.digits_network import DigitsConfig

    if not config:
        raise LoadError(
            "the checkpoint has no config.json, which describes the network; put it beside the file, or set model.path "
            "to the folder of both"
        )
    class_name = config.get("_class_name", "DigitsTransformer")
    if class_name != "DigitsTransformer":
        raise LoadError(
            f"config.json: _class_name={class_name!r}, but model.source=digits loads DigitsTransformer; "
            "choose the model source that fits the checkpoint"
        )
    values = {key: value for key, value in config.items() if not key.startswith("_") and key not in SAVED_FIELDS}
    known = [field.name for field in fields(DigitsConfig)]
    for key, value in values.items():
        if key not in known:
            raise LoadError(f"config.json: {key!r} is no field of DigitsTransformer; its fields are {choices(known)}")
        if type(value) is not int or value < 1:
            raise LoadError(f"config.json: {key}={value!r} must be a whole number, 1 or more")
    architecture = DigitsConfig(**values)
    if architecture.image_size != 8:
        raise LoadError(f"config.json: image_size={architecture.image_size}, but digits have 8x8 pixels; set it to 8")
    for whole, part in (("image_size", "patch_size"), ("width", "heads")):
        if getattr(architecture, whole) % getattr(architecture, part):
            raise LoadError(
                f"config.json: {part}={getattr(architecture, part)} does not divide "
                f"{whole}={getattr(architecture, whole)}; the file does not describe a DigitsTransformer"
            )
    return architecture


def _classifier() -> tuple[DigitsClassifier, Tensor, Tensor]:
    """(the embedded classifier in fp32, mean and covariance of its features over the real digits)."""
    from safetensors.torch import load_file

    from qexp.models.digits_network import DigitsClassifier

    if not CLASSIFIER.is_file():
        raise LoadError(f"{CLASSIFIER}: the classifier is missing; reinstall qexp, or run scripts/train_digits.py")
    tensors = load_file(CLASSIFIER)
    mean, covariance = tensors.pop("real_features.mean"), tensors.pop("real_features.covariance")
    classifier = DigitsClassifier()
    classifier.load_state_dict(tensors)
    return classifier.eval(), mean, covariance
