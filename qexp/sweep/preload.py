"""The modules that an experiment imports: before its memory is measured, or once for all that are forked."""

from __future__ import annotations

import importlib
from collections.abc import Iterable

from qexp.config.plugins import plugin_module
from qexp.config.schema import RunConfig

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
    methods = sorted({name for component in config.components.values() for name in component.backend.methods()})
    quantizers = [plugin_module("backend", method).Quantizer for method in methods]
    names = [*ALWAYS, *(name for quantizer in quantizers for name in quantizer.imports)]
    if any(quantizer.has_kernels for quantizer in quantizers):
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
