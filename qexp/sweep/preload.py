"""The modules that an experiment imports: before its memory is measured, or once for all that are forked."""

from __future__ import annotations

import importlib
from collections.abc import Iterable

from qexp.config.plugins import plugin_module
from qexp.config.schema import RunConfig

ALWAYS = ("torch", "qexp.experiments.run", "qexp.scoring.score", "safetensors.torch")
KERNELS = "qexp.quantizers.cpu_kernels.kernels"
OF_IMAGES = ("torchmetrics.functional.image", "PIL.Image")


def modules_of(config: RunConfig) -> tuple[str, ...]:
    """Names of the modules that this experiment and its scoring import, its own and the libraries'. Imports neither."""
    methods = sorted({name for component in config.components.values() for name in component.backend.methods()})
    quantizers = [plugin_module("backend", method).Quantizer for method in methods]
    names = [*ALWAYS, *(name for quantizer in quantizers for name in quantizer.imports)]
    if any(quantizer.has_kernels for quantizer in quantizers):
        names.append(KERNELS)
    modality = plugin_module("model", config.model.source).Source.modality
    if config.task.name == "generate" and modality == "images" and "ssim" in config.metrics.names:
        names += OF_IMAGES
    return tuple(dict.fromkeys(names))


def import_modules(names: Iterable[str]) -> None:
    for name in names:
        importlib.import_module(name)
