"""The classes of a pipeline: networks of its components, and diffusers' pipeline object around them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import diffusers
import torch
import transformers
from diffusers.models.model_loading_utils import _fetch_remapped_cls_from_config
from diffusers.models.modeling_utils import LegacyModelMixin
from diffusers.pipelines.pipeline_loading_utils import _maybe_remap_transformers_class
from diffusers.utils import logging
from torch import nn
from transformers.initialization import no_init_weights

from qexp.checkpoints.pipeline_folder import INDEX, PipelineFolder
from qexp.errors import LoadError
from qexp.models.folder import NOT_THE_NETWORKS
from qexp.models.skeletons import as_from_pretrained
from qexp.models.transformers_networks import compute_buffers, compute_positions, transformers_config
from qexp.offloading.strategies import offload_of
from qexp.system.imports import quiet


def name_schedulers() -> None:
    """Have diffusers import the schedulers that a scheduler is asked for as compatible ones when it is made."""
    from diffusers.schedulers import KarrasDiffusionSchedulers

    for kind in KarrasDiffusionSchedulers:
        with suppress(Exception):  # one that cannot be imported is nobody's, or an error of the pipeline that has it
            getattr(diffusers, kind.name)


def network(folder: PipelineFolder, component: str, config: Mapping[str, Any]) -> nn.Module:
    """Return a component's network, without weights, from its parsed config.json."""
    fields = {name: value for name, value in config.items() if name not in NOT_THE_NETWORKS}
    kind = _component_class(folder, component)
    if issubclass(kind, diffusers.ModelMixin):
        if issubclass(kind, LegacyModelMixin):  # a general class of old; which one it stands for, its norm says
            kind = _fetch_remapped_cls_from_config(fields, kind)
        with as_from_pretrained():
            built: nn.Module = kind.from_config(fields)
        return built
    if not issubclass(kind, transformers.PreTrainedModel):
        raise LoadError(
            f"'{folder.path / INDEX}' says that '{component}' is {kind.__name__}, which is no model class of diffusers "
            f"or transformers"
        )
    with no_init_weights(), as_from_pretrained():
        model: Any = kind(transformers_config(fields, folder.path / component, kind.config_class))
    compute_buffers(model, model)
    compute_positions(model)
    model.tie_weights()  # part of what was left out
    return model


def _component_class(folder: PipelineFolder, component: str) -> Any:
    library, name = folder.parts[component]
    modules = {"diffusers": diffusers, "transformers": transformers}
    module = modules.get(library) or getattr(diffusers.pipelines, library, None)
    if module is transformers:
        name = _maybe_remap_transformers_class(name) or name
    with quiet():
        kind = getattr(module, name, None)
    if isinstance(kind, type):
        return kind
    raise LoadError(
        f"'{folder.path / INDEX}' says that '{component}' is {name} of {library}, {_why_missing(folder, library)}"
    )


def pipeline_class(folder: PipelineFolder) -> Any:
    """Raise LoadError for a class that this version of diffusers has not."""
    with quiet():
        kind = getattr(diffusers, folder.class_name, None)
    if isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline):
        return kind
    raise LoadError(f"'{folder.path / INDEX}' is of a {folder.class_name}, {_why_missing(folder, 'diffusers')}")


def _why_missing(folder: PipelineFolder, library: str) -> str:
    """Say why a class is not installed."""
    made = folder.index.get("_diffusers_version")
    installed = {"diffusers": diffusers.__version__, "transformers": transformers.__version__}
    if library not in installed:
        return "a library whose models are not loaded; use a pipeline with models of diffusers and transformers"
    by = f" (the pipeline was saved by diffusers {made})" if made else ""
    return f"which {library} {installed[library]} has not{by}; install a version that has it: pip install -U {library}"


def assemble(folder: PipelineFolder, models: Mapping[str, nn.Module]) -> Any:
    """diffusers' pipeline around models: its own `from_pretrained`, which loads what has no weights.

    Raises: LoadError if the folder lacks something, or was made for another version.
    """
    kind = pipeline_class(folder)
    known = inspect.signature(kind.__init__).parameters
    if unknown := [name for name in (*folder.parts, *folder.arguments) if name not in known]:
        raise LoadError(
            f"'{folder.path / INDEX}' has {unknown[0]!r}, which the {kind.__name__} of diffusers "
            f"{diffusers.__version__} does not take{_made_by(folder)}; install the version that the pipeline is for"
        )
    absent = {name: None for name, value in folder.arguments.items() if value is None and name in known}
    try:
        with quiet(), _no_progress():
            pipeline = _with_own_device(kind).from_pretrained(folder.path, local_files_only=True, **models, **absent)
    except (ImportError, OSError, TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise LoadError(
            f"'{folder.path}': diffusers {diffusers.__version__} and transformers {transformers.__version__} cannot "
            f"open its {', '.join(folder.others) or INDEX} as {kind.__name__} ({reason}){_made_by(folder)}; check "
            f"these folders, or install the version that the pipeline is for"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _made_by(folder: PipelineFolder) -> str:
    made = folder.index.get("_diffusers_version")
    return f" (it was saved by diffusers {made})" if made else ""


@cache
def _with_own_device(kind: Any) -> Any:
    """Return the pipeline's class, which knows where models compute whose weights rest elsewhere."""

    @property  # type: ignore[misc]
    def _execution_device(self: Any) -> torch.device:
        for model in self.components.values():
            handle: Any = offload_of(model) if isinstance(model, nn.Module) else None
            if handle is not None:
                return handle.device
        return kind._execution_device.fget(self)

    names = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(kind)(kind.__name__, (kind,), {**names, "_execution_device": _execution_device})


@contextmanager
def _no_progress() -> Iterator[None]:
    """Without a bar for what takes no time."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
