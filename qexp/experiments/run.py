"""One experiment from its configuration to files and numbers: load, place, run, measure."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qexp.checkpoints.checkpoint import open_component
from qexp.checkpoints.pipeline_folder import INDEX
from qexp.errors import ConfigError
from qexp.experiments.roundtrip import run_roundtrip
from qexp.experiments.statistics import Metrics, load_statistics, offload_statistics, run_peaks
from qexp.hub.upload import push
from qexp.loading.component import LoadedComponent, PlannedComponent, plan_statistics
from qexp.loading.components import plan_components
from qexp.loading.lifecycle import load_planned
from qexp.loading.prepare import skeleton_and_names
from qexp.loading.saving import save_model, save_tensors
from qexp.models.base import load_source
from qexp.offloading.dispatch import Dispatch
from qexp.offloading.payload import module_nbytes
from qexp.offloading.strategies import Offload, apply_offload
from qexp.results.labels import backend_label
from qexp.results.run_folder import PUSHED
from qexp.system.files import to_csv, write_json, write_text
from qexp.system.memory import GIB, PeakMemory, device_memory, host_memory
from qexp.tasks import forward, forward_inputs, generate, perplexity, text
from qexp.tasks.calibration import calibrate
from qexp.tasks.recorder import TaskResult

if TYPE_CHECKING:
    from qexp.config.schema import RunConfig
    from qexp.models.base import ModelSource


def run_experiment(config: RunConfig, folder: Path) -> Metrics:
    """Run one experiment; its files go into `folder`, its metrics are returned by name (`group/name_unit`).

    A task that runs the model writes plan.json, outputs.safetensors and memory.csv; roundtrip plan.json and layers.csv.
    """
    device = torch.device(config.device)
    source = load_source(config.model)
    if config.task.name == "roundtrip":
        return run_roundtrip(config, source, device, folder)
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
            block_lists=source.block_lists(models[name]),
            store=folder / "offload" / name,
        )

    waiting = []  # for calibration, which needs all components, and those resident that it is for
    for name, component in planned.items():
        loaded[name] = load_planned(component, config.loader)
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
        **load_statistics(list(loaded.values())),
        **plan_statistics([component.plan for component in loaded.values()], weights_bytes),
    }
    with PeakMemory(device) as peak:
        result = _run_task(config, source, models, device, folder, inputs)
    metrics |= offload_statistics(list(offloads.values()))
    save_tensors(folder / "outputs.safetensors", result.outputs)
    write_text(folder / "memory.csv", to_csv(list(result.rows[0]), result.rows))
    baseline = next(iter(loaded.values())).memory.baseline
    return {**metrics, **result.metrics, **run_peaks(peak, baseline.total_bytes)}


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
        if source.is_pipeline:
            (folder / INDEX).unlink(missing_ok=True)  # of an earlier one: it says that all is there
        for name, model in models.items():
            place = folder / name if source.is_pipeline else folder
            limit = int(save.max_shard_gib * GIB)
            files += save_model(model, place, max_shard_bytes=limit, interchange=save.interchange)
            if save.path is not None:
                print(f"saved {name} to {place}", file=sys.stderr)
        if source.is_pipeline:
            files = [*source.save_side_files(folder), *files]
        if save.push_to_hub is not None:
            message = f"Upload {config.model.source} in {backend_label(config.to_container())}"
            pushed = push(folder, files, save, message)
            write_json(run_folder / PUSHED, pushed)
            print(f"pushed to {pushed['url']}", file=sys.stderr)


def _now(device: torch.device) -> tuple[float, float]:
    """(resident host memory, allocated device memory) in GiB."""
    return host_memory().total_bytes / GIB, device_memory(device) / GIB
