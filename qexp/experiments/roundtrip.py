"""Run `task=roundtrip`: quantize layer by layer, compare with the original weights, keep no model."""

from __future__ import annotations

import time

from qexp.checkpoints.checkpoint import Checkpoint, open_component
from qexp.config.schema import RunConfig
from qexp.errors import ConfigError, first_names
from qexp.experiments.reference import unquantized_model
from qexp.experiments.statistics import Metrics, run_peaks
from qexp.loading.component import plan_statistics
from qexp.loading.components import check_shared_patterns
from qexp.loading.lifecycle import warm_up
from qexp.loading.prepare import load_quantizer_of, prepare, skeleton_and_names
from qexp.models.base import load_source
from qexp.system.files import write_json, write_text
from qexp.system.memory import PeakMemory
from qexp.system.screen import say
from qexp.tasks import roundtrip
from qexp.tasks.context import RunContext


def run_roundtrip(context: RunContext) -> Metrics:
    """Measure every layer; writes plan.json and layers.csv."""
    started, config, device = time.perf_counter(), context.config, context.device
    prepared, originals, rows = {}, dict[str, Checkpoint | None](), []
    for name in _measured_components(context):
        request = context.requests[name]
        quantizer = load_quantizer_of(request)
        originals[name] = _original(config, name) if quantizer.stored else None
        if quantizer.stored and originals[name] is None:
            raise ConfigError(
                f"task=roundtrip compares with the original weights, but '{request.checkpoint.path}' is quantized "
                "already; set model.reference_path to the checkpoint that it was made from, or model.path to quantize "
                "that one"
            )
        prepared[name] = prepare(request, quantizer)
        warm_up(prepared[name], device)
    check_shared_patterns(prepared, config.components)
    with PeakMemory(device) as peak:
        for name, component in prepared.items():
            rows += roundtrip.measure_layers(component, loader=config.loader, original=originals[name])
    if broken := roundtrip.nonfinite_layers(rows):
        say(
            f"warning: {len(broken)} layers are not finite once they are dequantized, and not in the means: "
            f"{first_names(broken)}; skip them (skip_modules), or use another backend",
        )
    plans = {name: component.plan.to_container() for name, component in prepared.items()}
    write_json(context.folder / "plan.json", plans)
    write_text(context.folder / "layers.csv", roundtrip.rows_to_csv(rows))
    weights_bytes = sum(plan["result_bytes"] for plan in plans.values())
    return {
        **plan_statistics([component.plan for component in prepared.values()], weights_bytes),
        **roundtrip.summarize(rows),
        "time/total_seconds": time.perf_counter() - started,
        **run_peaks(peak, peak.baseline.total_bytes),
    }


def _measured_components(context: RunContext) -> list[str]:
    """Return components with a backend; with backend=none, the ones that `backend=` would quantize."""
    components = context.config.components
    quantized = [name for name, settings in components.items() if settings.backend.quant_method != "none"]
    return quantized or list(context.source.quantized_components())


def _original(config: RunConfig, component: str) -> Checkpoint | None:
    """Return the unquantized checkpoint of a component, in `model.reference_path`; None if none is named."""
    if not config.model.has_original:
        return None
    source = load_source(unquantized_model(config.model))
    return skeleton_and_names(source, component, open_component(source, component))[1]
