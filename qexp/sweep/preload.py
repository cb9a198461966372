"""The modules that an experiment imports: before its memory is measured, or once for all that are forked."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from contextlib import suppress

from qexp.checkpoints.checkpoint import open_components
from qexp.config.plugins import plugin_module
from qexp.config.schema import RunConfig
from qexp.models.base import load_source
from qexp.quantizers.embedded import is_quantized
from qexp.system.imports import quiet

ALWAYS = (
    *("torch", "numpy.random", "accelerate", "safetensors.torch"),
    *("qexp.experiments.run", "qexp.models.skeletons", "qexp.scoring.score", "qexp.metrics.registry:all_metrics"),
    "qexp.results.environment:package_commit",
)
KERNELS = "qexp.quantizers.cpu_kernels.loops:start_llvm"
OF_IMAGES = (
    *("PIL.ImageDraw", "PIL.Image:preinit"),
    *("qexp.scoring.detected", "qexp.scoring.perceptual", "qexp.scoring.pictures"),
)


def modules_of(config: RunConfig) -> tuple[str, ...]:
    """Return names of what this experiment and its scoring import, of this program and of libraries. Imports nothing.

    module:function stands for what a function imports, package::Class for what naming a class does.
    """
    source = load_source(config.model)
    opened = open_components(source)
    names, needs_kernels = [*ALWAYS], False
    for component, settings in config.components.items():
        for method in sorted(settings.backend.methods()):
            quantizer = plugin_module("backend", method).Quantizer
            names += quantizer.imports
            needs_kernels |= quantizer.needs_kernels(stored=is_quantized(opened[component]))
    if needs_kernels:
        names.append(KERNELS)
    names += (*source.imports, *source.library_classes())
    if config.task.name == "generate" and source.modality == "images":
        names += OF_IMAGES
    return tuple(dict.fromkeys(names))


def import_modules(names: Iterable[str]) -> None:
    """Import modules, call functions, module:function, that import what they need, and name classes, package::Class."""
    for name in names:
        module, mark, attribute = name.partition("::" if "::" in name else ":")
        with quiet():
            imported = importlib.import_module(module)
            if mark == "::":
                with suppress(Exception):  # whatever it is, the load that needs the class says it
                    getattr(imported, attribute)
        if mark == ":":
            getattr(imported, attribute)()
