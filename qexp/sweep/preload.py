"""The modules that an experiment imports: before its memory is measured, or once for all that are forked."""

from __future__ import annotations

import importlib
from collections.abc import Iterable

from qexp.checkpoints.checkpoint import open_components
from qexp.config.plugins import plugin_module
from qexp.config.schema import RunConfig
from qexp.models.base import load_source
from qexp.quantizers.embedded import is_quantized

ALWAYS = (
    *("torch", "numpy", "accelerate", "safetensors.torch"),
    *("qexp.experiments.run", "qexp.models.skeletons", "qexp.scoring.score", "qexp.metrics.registry:all_metrics"),
    "qexp.results.environment:package_commit",
)
KERNELS = "qexp.quantizers.cpu_kernels.kernels:prepare"
OF_IMAGES = (
    *("PIL.ImageDraw", "PIL.Image:preinit"),
    *("qexp.scoring.detected", "qexp.scoring.perceptual", "qexp.scoring.pictures"),
)


def modules_of(config: RunConfig) -> tuple[str, ...]:
    """Return names of what this experiment and its scoring import, of this program and of libraries. Imports nothing.

    module:function stands for what a function imports.
    """
    opened = open_components(load_source(config.model))
    names, needs_kernels = [*ALWAYS], False
    for component, settings in config.components.items():
        for method in sorted(settings.backend.methods()):
            quantizer = plugin_module("backend", method).Quantizer
            names += quantizer.imports
            needs_kernels |= quantizer.needs_kernels(stored=is_quantized(opened[component]))
    if needs_kernels:
        names.append(KERNELS)
    source = plugin_module("model", config.model.source).Source
    names += source.imports
    if config.task.name == "generate" and source.modality == "images":
        names += OF_IMAGES
    return tuple(dict.fromkeys(names))


def import_modules(names: Iterable[str]) -> None:
    """Import modules, and call functions, module:function, that import what they need."""
    for name in names:
        module, _, function = name.partition(":")
        imported = importlib.import_module(module)
        if function:
            getattr(imported, function)()
