"""The unquantized experiment that a run is compared with."""

from __future__ import annotations

from dataclasses import replace

from qexp.checkpoints.checkpoint import open_components
from qexp.config.model import ModelConfig
from qexp.config.offload import OffloadConfig
from qexp.config.schema import ComponentConfig, RunConfig, SaveConfig
from qexp.errors import ConfigError
from qexp.models.base import load_source
from qexp.quantizers.embedded import is_quantized
from qexp.quantizers.none import NoneConfig


def reference_config(config: RunConfig) -> RunConfig:
    """Return the experiment with nothing quantized, in the reference's dtype, offloaded as in `reference.offload`.

    Where the checkpoint is quantized already, the reference is that of `model.reference_path`.
    """
    components = {
        name: ComponentConfig(backend=NoneConfig(), compute_dtype=config.reference.dtype, plain_fp8=component.plain_fp8)
        for name, component in config.components.items()
    }
    quantized = any(map(is_quantized, open_components(load_source(config.model)).values()))
    return replace(
        config,
        model=unquantized_model(config.model) if quantized else replace(config.model, reference_path=None),
        save=SaveConfig(),
        components=components,
        offload=OffloadConfig(strategy=config.reference.offload).resolved(config.device.partition(":")[0]),
        # modules of a map may not fit where they are put once they are not quantized
        device_map="auto" if config.device_map is not None and config.reference.offload == "none" else None,
    )


def unquantized_model(model: ModelConfig) -> ModelConfig:
    """Return the model that a quantized checkpoint is compared with. Raises ConfigError if that is quantized itself."""
    original: ModelConfig = model.unquantized()
    for name, checkpoint in open_components(load_source(original)).items():
        if is_quantized(checkpoint):
            raise ConfigError(
                f"the component '{name}' to compare with, '{checkpoint.path}', is quantized itself; set "
                "model.reference_path to the unquantized model"
            )
    return original


def saves_outputs(config: RunConfig) -> bool:
    """Return whether the task leaves outputs to compare with a reference; a task config may say no."""
    return bool(config.task.saves_outputs)
