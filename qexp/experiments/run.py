"""One experiment from its configuration to files and numbers: load, place, run, measure."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qexp.checkpoints.checkpoint import Checkpoint, open_component
from qexp.checkpoints.pipeline_folder import INDEX
from qexp.errors import ConfigError
from qexp.hub.upload import push
from qexp.loading.components import check_shared_patterns, plan_components
from qexp.loading.lifecycle import (
    LoadedComponent,
    PlannedComponent,
    load_planned,
    plan_statistics,
    prepare,
    resolve_quantizer,
    skeleton_and_names,
    warm_up,
)
from qexp.loading.saving import save_model, save_tensors
from qexp.models.base import load_source
from qexp.offloading.dispatch import Dispatch
from qexp.offloading.payload import module_nbytes
from qexp.offloading.strategies import Offload, apply_offload
from qexp.quantizers.embedded import is_quantized
from qexp.results.labels import backend_label
from qexp.sweep.run_key import unquantized_model
from qexp.system.files import PUSHED, to_csv, write_json, write_text
from qexp.system.memory import GIB, PeakMemory, device_memory, host_memory
from qexp.tasks import forward, forward_inputs, generate, perplexity, roundtrip, text
from qexp.tasks.calibration import calibrate
from qexp.tasks.recorder import TaskResult

if TYPE_CHECKING:
    from qexp.config.schema import RunConfig
    from qexp.models.base import ModelSource

Metrics = dict[str, float | None]


def run_experiment(config: RunConfig, folder: Path) -> Metrics:
    """Run one experiment; its files go into `folder`, its metrics are returned by name (`group/name_unit`).

    A task that runs the model writes plan.json, outputs.safetensors and memory.csv; roundtrip plan.json and layers.csv.
    """
    device = torch.device(config.device)
    source = load_source(config.model)
    if config.task.name == "roundtrip":
        return _roundtrip(config, source, device, folder)
    return _run_model(config, source, device, folder)


def check_experiment(config: RunConfig, folder: Path) -> None:
    """Raises what `run_experiment` raises before it reads weights. Not of roundtrip, which begins with that."""
    _prepared(config, load_source(config.model), torch.device(config.device), folder)


def _prepared(
    config: RunConfig, source: ModelSource, device: torch.device, folder: Path
) -> tuple[RunConfig, dict[str, PlannedComponent], dict[str, Tensor] | None]:
    """The experiment with the components that it needs, their plans, and given inputs: no weight is read."""
    inputs = None
    if config.task.name == "forward":
        config, inputs = _inputs_of_forward(config, source)
    planned = _plan(config, source, device, folder)
    if hasattr(source, "check_run"):
        source.check_run({name: component.prepared.model for name, component in planned.items()}, config.task)
    return config, planned, inputs


def _run_model(config: RunConfig, source: ModelSource, device: torch.device, folder: Path) -> Metrics:
    config, planned, inputs = _prepared(config, source, device, folder)
    models = {name: component.prepared.model for name, component in planned.items()}
    for hint in (_slow_dtypes(planned.values(), device), _other_dtype_than_reference(config, planned)):
        if hint is not None:
            print(hint, file=sys.stderr)
    if inputs is not None:
        inputs = forward_inputs.in_dtype(inputs, next(iter(planned.values())).prepared.compute_dtype)
    write_json(folder / "plan.json", {name: _plan_of(component) for name, component in planned.items()})
    loaded, weights_bytes, offloads = dict[str, LoadedComponent](), 0, dict[str, Offload | Dispatch]()

    def offload(name: str) -> None:
        offloads[name] = loaded[name].dispatch or apply_offload(
            models[name],
            config.offload,
            device=device,
            block_lists=source.block_lists(name),
            store=folder / "offload" / name,
        )

    waiting = []  # for calibration, which needs all components, and those resident that it is for
    for name, component in planned.items():
        loaded[name] = load_planned(component, config.loader)
        if hasattr(source, "adapt"):
            source.adapt(name, models[name], component.prepared.compute_dtype)
        weights_bytes += module_nbytes(models[name])
        if component.prepared.quantizer.requires_calibration:
            waiting.append(name)
        else:
            offload(name)  # before the next one is loaded: they need not fit together
    calibrate(source, models, config.task, seed=config.seed, device=device, inputs=inputs)
    for name in waiting:
        offload(name)
    if config.save.wanted:
        _save(config, source, models, folder)
    metrics: Metrics = {
        **_load_statistics(list(loaded.values())),
        **plan_statistics([component.plan for component in loaded.values()], weights_bytes),
    }
    with PeakMemory(device) as peak:
        result = _run_task(config, source, models, device, folder, inputs)
    metrics |= _offload_statistics(list(offloads.values()))
    save_tensors(folder / "outputs.safetensors", result.outputs)
    write_text(folder / "memory.csv", to_csv(list(result.rows[0]), result.rows))
    baseline = next(iter(loaded.values())).memory.baseline
    return {**metrics, **result.metrics, **_run_peaks(peak, baseline.total_bytes)}


def _plan(config: RunConfig, source: ModelSource, device: torch.device, folder: Path) -> dict[str, PlannedComponent]:
    return plan_components(
        source,
        config.components,
        device=device,
        device_map=config.device_map,
        max_memory=config.max_memory,
        store=folder / "offload",
        travels=config.offload.strategy != "none",
    )


def _slow_dtypes(planned: Iterable[PlannedComponent], device: torch.device) -> str | None:
    """What to say of dtypes for which this CPU has no instructions (PyTorch 2.13's kernels need AVX-512 for them)."""
    capability = torch.backends.cpu.get_cpu_capability()
    if device.type != "cpu" or capability not in ("AVX2", "DEFAULT") or platform.machine() != "x86_64":
        return None
    halves = {part.prepared.compute_dtype for part in planned} - {torch.float32}
    if not halves:
        return None
    names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in halves))
    return f"this CPU has no AVX-512, without which {names} is several times slower than compute_dtype=fp32"


def _other_dtype_than_reference(config: RunConfig, planned: Mapping[str, PlannedComponent]) -> str | None:
    """What to say if the reference, in the checkpoint's dtype, computes in another one than this experiment."""
    for name, component in planned.items():
        own, dtype = component.prepared.own_dtype, component.prepared.compute_dtype
        if component.prepared.quantizer.stored:
            continue  # the reference is another checkpoint
        is_asked = config.components[name].compute_dtype is not None and config.reference.dtype is None
        if is_asked and own not in (None, dtype):
            this, other = (str(each).removeprefix("torch.") for each in (dtype, own))
            return (
                f"'{name}' computes in {this}, its reference in {other}, as the checkpoint is stored: what that rounds "
                f"is part of the difference between them; reference.dtype={this} leaves the quantization's alone"
            )
    return None


def _plan_of(component: PlannedComponent) -> dict[str, Any]:
    plan = component.prepared.plan.to_container()
    return plan if component.placement.is_default else {**plan, "placement": component.placement.to_container()}


def _run_task(
    config: RunConfig,
    source: Any,
    models: dict[str, nn.Module],
    device: torch.device,
    folder: Path,
    inputs: Mapping[str, Tensor] | None,
) -> TaskResult:
    def memory() -> tuple[float, float]:
        return _now(device)

    task, seed = config.task, config.seed
    if inputs is not None:
        return forward.run(next(iter(models.values())), inputs, task, device=device, memory=memory)
    if task.name == "perplexity":
        return perplexity.run(source, models, task, device=device, memory=memory, folder=folder)
    if task.name == "generate" and source.modality == "text":
        return text.run(source, models, task, seed=seed, device=device, memory=memory, folder=folder)
    if task.name == "generate":
        return generate.run(source, models, task, seed=seed, device=device, memory=memory)
    raise ConfigError(f"task.name={task.name!r} cannot be run; use forward, generate, perplexity or roundtrip")


def _inputs_of_forward(config: RunConfig, source: ModelSource) -> tuple[RunConfig, dict[str, Tensor]]:
    """The experiment with the one component that is called, and what it is called with, before a weight is read."""
    name = forward.component_of(config.task, config.components)
    skeleton, _ = skeleton_and_names(source, name, open_component(source, name))
    inputs = forward_inputs.read_inputs(config.task, source, skeleton)
    return replace(config, components={name: config.components[name]}), inputs


def _save(config: RunConfig, source: Any, models: Mapping[str, nn.Module], run_folder: Path) -> None:
    """Save every component, one straight into the folder, those of a whole into folders of their names with what else
    belongs to it; push them to a hub.

    A push is noted in hub.json. Without save.path, what is pushed is saved in the run's folder, and removed.
    """
    save = config.save
    with TemporaryDirectory(prefix=".save-", dir=run_folder) as scratch:
        folder = Path(save.path or scratch)
        files: list[Path] = []
        if hasattr(source, "save_side_files"):
            (folder / INDEX).unlink(missing_ok=True)  # of an earlier one: it says that all is there
        for name, model in models.items():
            place = folder / name if hasattr(source, "save_side_files") else folder
            files += save_model(model, place, max_shard_bytes=int(save.max_shard_gib * GIB))
            if save.path is not None:
                print(f"saved {name} to {place}", file=sys.stderr)
        if hasattr(source, "save_side_files"):
            files = [*source.save_side_files(folder), *files]
        if save.push_to_hub is not None:
            message = f"Upload {config.model.source} in {backend_label(config.to_container())}"
            pushed = push(folder, files, save, message)
            write_json(run_folder / PUSHED, pushed)
            print(f"pushed to {pushed['url']}", file=sys.stderr)


def _roundtrip(config: RunConfig, source: ModelSource, device: torch.device, folder: Path) -> Metrics:
    started = time.perf_counter()
    prepared, originals, rows = {}, dict[str, Checkpoint | None](), []
    for name in _measured(config, source):
        settings, checkpoint = config.components[name], open_component(source, name)
        quantizer = resolve_quantizer(settings.backend, checkpoint, name)
        originals[name] = _original(config, name) if quantizer.stored else None
        if quantizer.stored and originals[name] is None:
            raise ConfigError(
                f"task=roundtrip compares with the original weights, but '{checkpoint.path}' is quantized already; "
                "set model.reference_path to the checkpoint that it was made from, or model.path to quantize that one"
            )
        prepared[name] = prepare(source, name, settings, checkpoint, quantizer, device=device)
        warm_up(prepared[name], device)
    check_shared_patterns(prepared, config.components)
    with PeakMemory(device) as peak:
        for name, component in prepared.items():
            rows += roundtrip.measure_layers(
                component, name, device=device, loader=config.loader, original=originals[name]
            )
    plans = {name: component.plan.to_container() for name, component in prepared.items()}
    write_json(folder / "plan.json", plans)
    write_text(folder / "layers.csv", roundtrip.rows_to_csv(rows))
    weights_bytes = sum(plan["result_bytes"] for plan in plans.values())
    return {
        **plan_statistics([component.plan for component in prepared.values()], weights_bytes),
        **roundtrip.summarize(rows),
        "time/total_seconds": time.perf_counter() - started,
        **_run_peaks(peak, peak.baseline.total_bytes),
    }


def _measured(config: RunConfig, source: Any) -> list[str]:
    """The components whose layers are quantized; with backend=none, those that it is for."""
    quantized = [name for name, settings in config.components.items() if settings.backend.quant_method != "none"]
    return quantized or list(getattr(source, "quantized_components", source.components)())


def _original(config: RunConfig, component: str) -> Checkpoint | None:
    """The unquantized checkpoint of a component, in `model.reference_path`. Raises: ConfigError if it is quantized."""
    path = config.model.reference_path
    if path is None and not hasattr(config.model, "unquantized"):
        return None
    source = load_source(unquantized_model(config.model))
    checkpoint = open_component(source, component)
    if is_quantized(checkpoint):
        raise ConfigError(
            f"model.reference_path='{path or checkpoint.path}' is quantized itself; set it to the checkpoint with the "
            f"original weights"
        )
    return skeleton_and_names(source, component, checkpoint)[1]


def _load_statistics(loaded: Sequence[LoadedComponent]) -> Metrics:
    """The `load/` numbers of components loaded one after the other: times add up; peaks are over the first baseline."""
    memories = [component.memory for component in loaded]
    first = memories[0].baseline
    peaks = {
        "load/peak_host_gib": max(m.baseline.total_bytes + m.peak_bytes for m in memories) - first.total_bytes,
        "load/peak_anon_gib": max(m.baseline.anon_bytes + m.peak_anon_bytes for m in memories) - first.anon_bytes,
        "load/peak_file_gib": max(m.baseline.file_bytes + m.peak_file_bytes for m in memories) - first.file_bytes,
        "load/peak_device_gib": max(memory.peak_device_bytes for memory in memories),
    }
    return {
        "load/seconds": sum(component.seconds for component in loaded),
        "load/baseline_host_gib": first.total_bytes / GIB,
        **{name: nbytes / GIB for name, nbytes in peaks.items()},
    }


def _offload_statistics(offloads: Sequence[Offload | Dispatch]) -> Metrics:
    """The `offload/` numbers, and bytes by place where there is a device map, added up over components."""
    total: Metrics = {}
    for offload in offloads:
        for name, value in offload.statistics().items():
            total[name] = (total.get(name) or 0) + value
    return total


def _run_peaks(peak: PeakMemory, baseline_bytes: int) -> Metrics:
    """Peaks while the task ran: of the host over the baseline from before loading, of the device in all."""
    return {
        "memory/run_peak_host_gib": max(peak.baseline.total_bytes + peak.peak_bytes - baseline_bytes, 0) / GIB,
        "memory/run_peak_device_gib": peak.peak_device_bytes / GIB,
    }


def _now(device: torch.device) -> tuple[float, float]:
    """(resident host memory, allocated device memory) in GiB."""
    return host_memory().total_bytes / GIB, device_memory(device) / GIB
