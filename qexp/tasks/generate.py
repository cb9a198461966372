"""Generate samples from fixed seeds, so that a candidate and its reference start from the same noise."""

from __future__ import annotations

from dataclasses import dataclass

from qexp.errors import ConfigError


@dataclass(frozen=True)
class GenerateConfig:
    """num_images: samples in all; num_inference_steps: integration steps; guidance_scale: 1 is without guidance."""

    name: str = "generate"
    num_images: int = 200
    num_inference_steps: int = 20
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.num_images < 1 or self.num_inference_steps < 1:
            raise ConfigError(
                f"task.num_images={self.num_images} and task.num_inference_steps={self.num_inference_steps} "
                "must be 1 or more"
            )


Config = GenerateConfig
