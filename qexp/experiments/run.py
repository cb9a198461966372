"""One experiment from its configuration to files and numbers: load, place, run, measure."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from qexp.checkpoints.pipeline_folder import INDEX
from qexp.checkpoints.regular_file import read_ahead
from qexp.config.schema import RunConfig
from qexp.errors import ConfigError, choices
from qexp.experiments.roundtrip import run_roundtrip
from qexp.experiments.sensitivity import plan_sensitivity, run_sensitivity
from qexp.experiments.statistics import Metrics, load_statistics, load_trace, offload_statistics, run_peaks
from qexp.hub.upload import push
from qexp.loading.component import CacheFolder, LoadedComponent, PlannedComponent, plan_statistics
from qexp.loading.components import plan_components, request_components
from qexp.loading.file_layout import check_file_layouts
from qexp.loading.lifecycle import load_planned
from qexp.loading.prepare import skeleton_and_names
from qexp.loading.saving import layouts_of, save_model, save_tensors
from qexp.models.base import load_source
from qexp.offloading.dispatch import Dispatch
from qexp.offloading.payload import module_nbytes
from qexp.offloading.strategies import Offload, apply_offload
from qexp.results.labels import backend_label
from qexp.results.run_folder import BESIDE, LOAD_MEMORY, PUSHED
from qexp.results.saved_files import note_saved
from qexp.system.files import to_csv, write_json, write_text
from qexp.system.machine_load import MachineLoad
from qexp.system.memory import GIB, PeakMemory
from qexp.system.screen import say
from qexp.system.stages import Stage, show_stage
from qexp.tasks import forward, forward_inputs, generate, lm_eval, perplexity, text
from qexp.tasks.calibration import calibrate_models
from qexp.tasks.context import RunContext
from qexp.tasks.recorder import TaskResult


def run_experiment(config: RunConfig, folder: Path) -> Metrics:
    """Run one experiment; its files go into `folder`, its metrics are returned by name (`group/name_unit`).

    A task that runs the model writes plan.json, outputs.safetensors and memory.csv; roundtrip plan.json and layers.csv.
    """
    context = _open_context(config, folder)
    of_task = {"roundtrip": run_roundtrip, "sensitivity": run_sensitivity}
    return of_task.get(config.task.name, _run_model)(context)


def check_experiment(config: RunConfig, folder: Path) -> None:
    """Raise what `run_experiment` raises before it reads weights. Not of roundtrip, which begins with that."""
    context = _open_context(config, folder)
    if config.task.name == "sensitivity":
        plan_sensitivity(context)
    else:
        _plan_run(context)


def _open_context(config: RunConfig, folder: Path) -> RunContext:
    source, device = load_source(config.model), torch.device(config.device)
    requests = request_components(
        source,
        config.components,
        device=device,
        device_map=config.device_map,
        max_memory=config.max_memory,
        store=folder / "offload",
        cache=CacheFolder.of(
            config.loader,
            is_full=config.identity == "full",
            in_child=config.isolation.mode == "process" and device.type == "cpu",
        ),
    )
    return RunContext(config, source, device, folder, requests)


def _plan_run(context: RunContext) -> tuple[RunContext, dict[str, PlannedComponent]]:
    """Plan the components that the task needs: (the context with their skeletons, plans). No weight is read."""
    show_stage(Stage("reading the checkpoint"))
    if context.task.name == "forward":
        context = _with_inputs(context)
    if context.task.name == "lm_eval":
        lm_eval.check_tasks(context.task)
    planned = plan_components(context.requests, travels=context.config.offload.strategy != "none")
    context = replace(context, models={name: component.prepared.model for name, component in planned.items()})
    context.source.check_run(context.models, context.task)
    return context, planned


def _with_inputs(context: RunContext) -> RunContext:
    """Return the context with the one component that `task=forward` calls, and what it is called with."""
    config, source = context.config, context.source
    name = forward.component_of(config.task, config.components)
    request = context.requests[name]
    skeleton, _ = skeleton_and_names(source, name, request.checkpoint)
    inputs = forward_inputs.read_inputs(config.task, source, skeleton)
    config = replace(config, components={name: config.components[name]})
    return replace(context, config=config, requests={name: request}, inputs=inputs)


def _run_model(context: RunContext) -> Metrics:
    read_ahead(file for request in context.requests.values() for file in request.checkpoint.files)
    context, planned = _plan_run(context)
    for hint in (_slow_dtypes(planned.values(), context.device), _other_dtype_than_reference(context.config, planned)):
        if hint is not None:
            say(hint)
    if context.inputs is not None:
        dtype = next(iter(planned.values())).prepared.compute_dtype
        context = replace(context, inputs=forward_inputs.in_dtype(context.inputs, dtype))
    if context.config.save.layout is not None:
        check_file_layouts(component.prepared for component in planned.values())
    write_json(context.folder / "plan.json", {name: _plan_of(component) for name, component in planned.items()})
    loaded, offloads, weights_bytes = _load_components(context, planned)
    if context.config.save.wanted:
        _save_components(context)
    with MachineLoad() as load, PeakMemory(context.device) as peak:
        result = _run_task(context)
    write_json(context.folder / BESIDE, {"processes": load.beside})
    save_tensors(context.folder / "outputs.safetensors", result.outputs)
    write_text(context.folder / "memory.csv", to_csv(list(result.rows[0]), result.rows))
    if context.memory_gib()[0] is not None and (trace := load_trace(loaded)):
        write_text(context.folder / LOAD_MEMORY, to_csv(list(trace[0]), trace))
    return {
        **load_statistics(loaded),
        **plan_statistics([component.plan for component in loaded], weights_bytes),
        **offload_statistics(offloads),
        **result.metrics,
        **load.metrics(),
        **run_peaks(peak, loaded[0].memory.baseline.total_bytes),
    }


def _load_components(
    context: RunContext, planned: Mapping[str, PlannedComponent]
) -> tuple[list[LoadedComponent], list[Offload | Dispatch], int]:
    """Load, calibrate and offload every component: (components, what moves their weights, bytes of all weights)."""
    loaded, offloads, weights_bytes = dict[str, LoadedComponent](), dict[str, Offload | Dispatch](), 0

    def offload(name: str) -> None:
        model = context.models[name]
        offloads[name] = loaded[name].dispatch or apply_offload(
            model,
            context.config.offload,
            device=context.device,
            block_lists=context.source.block_lists(model),
            store=context.folder / "offload" / name,
        )

    needs_calibration = []  # stay on the device until calibrate_models has run the whole pipeline
    for name, component in planned.items():
        loaded[name] = load_planned(component, context.config.loader)
        context.source.adapt(name, context.models[name], component.prepared.compute_dtype)
        weights_bytes += module_nbytes(context.models[name])
        if component.prepared.quantizer.requires_calibration:
            needs_calibration.append(name)
        else:
            offload(name)  # before the next one is loaded: they need not fit together
    if needs_calibration:
        show_stage(Stage("calibrating"))
    calibrate_models(context)
    for name in needs_calibration:
        offload(name)
    return list(loaded.values()), list(offloads.values()), weights_bytes


def _slow_dtypes(planned: Iterable[PlannedComponent], device: torch.device) -> str | None:
    """Warn of dtypes for which this CPU has no instructions (PyTorch 2.13's kernels need AVX-512 for them)."""
    capability = torch.backends.cpu.get_cpu_capability()
    if device.type != "cpu" or capability not in ("AVX2", "DEFAULT") or platform.machine() != "x86_64":
        return None
    halves = {part.prepared.compute_dtype for part in planned} - {torch.float32}
    if not halves:
        return None
    names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in halves))
    return f"this CPU has no AVX-512, without which {names} is several times slower than compute_dtype=fp32"


def _other_dtype_than_reference(config: RunConfig, planned: Mapping[str, PlannedComponent]) -> str | None:
    """Warn if the reference, in the checkpoint's dtype, computes in another one than this experiment."""
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


def _run_task(context: RunContext) -> TaskResult:
    is_text = context.source.modality == "text"
    tasks = {
        "forward": forward.run_forward,
        "generate": text.run_generate_text if is_text else generate.run_generate,
        "perplexity": perplexity.run_perplexity,
        "lm_eval": lm_eval.run_lm_eval,
    }
    if context.task.name not in tasks:  # of a plugin
        raise ConfigError(f"task.name={context.task.name!r} cannot be run; use {choices(tasks)}, or roundtrip")
    return tasks[context.task.name](context)


def _save_components(context: RunContext) -> None:
    """Save every component, one straight into the folder, those of a pipeline into folders of their names with what
    else belongs to it; push them to a hub.

    What was saved is noted in saved.json, a push in hub.json. Without save.path, what is pushed is saved in the run's
    folder, and removed.
    """
    config, source, run_folder, save = context.config, context.source, context.folder, context.config.save
    show_stage(Stage("saving the model"))
    with TemporaryDirectory(prefix=".save-", dir=run_folder) as scratch:
        folder = Path(save.path or scratch)
        files: list[Path] = []
        if source.is_pipeline:
            (folder / INDEX).unlink(missing_ok=True)  # of an earlier one: it says that all is there
        layouts = layouts_of(context.models, save.layout)
        for name, model in context.models.items():
            place = folder / name if source.is_pipeline else folder
            limit = int(save.max_shard_gib * GIB)
            files += save_model(model, place, max_shard_bytes=limit, interchange=save.interchange, layout=layouts[name])
            if save.path is not None:
                say(f"saved {name} to {place}")
        if source.is_pipeline:
            files = [*source.save_side_files(folder), *files]
        if save.path is not None:
            note_saved(run_folder, folder, files)
        if save.push_to_hub is not None:
            message = f"Upload {config.model.source} in {backend_label(config.to_container())}"
            pushed = push(folder, files, save, message)
            write_json(run_folder / PUSHED, pushed)
            say(f"pushed to {pushed['url']}")
