"""The program as functions, for notebooks and other programs: `import qexp`, then `qexp.load(...)` and the others.

They take what the configuration takes, by the same names, and are checked by the same dataclasses. A model that `load`
returns is an ordinary `nn.Module` in eval mode, its weights frozen. Quantized, it has three methods more:

    model.dequantize()            ordinary linear layers again, in place, and nothing that says "quantized"
    model.get_memory_footprint()  true bytes
    model.to(device)              moves it whole; a cast (.to(dtype), .half(), …) is a ConfigError, a ValueError

Errors are those of `qexp.errors`; each message says what to do.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qexp.api.arguments import SOURCE, backend_config, check_model, expanded, loader_settings, named, places_of
from qexp.checkpoints.checkpoint import refuse_source
from qexp.checkpoints.pipeline_folder import INDEX
from qexp.config.backend_options import backend_of, model_skip_modules
from qexp.config.dataclass_io import from_plain
from qexp.config.module_patterns import union
from qexp.config.offload import OffloadConfig
from qexp.config.plugins import plugin_module, plugin_names
from qexp.config.schema import SaveConfig
from qexp.config.yaml_options import option_names
from qexp.errors import ConfigError, LoadError, choices, did_you_mean
from qexp.hub.download import hub_id, local_folder, pinned
from qexp.models.base import ModelSource, load_source
from qexp.models.component_settings import parse_component
from qexp.models.diffusers import DiffusersConfig
from qexp.system.devices import resolve_device

if TYPE_CHECKING:
    import torch
    from torch import nn

    from qexp.offloading.strategies import Offload

GIB = 1 << 30


def backends() -> tuple[str, ...]:
    """Return the names that `load` takes for a backend: options of `backend=` that need nothing else, so not mixed."""
    return tuple(name for name in option_names("backend") if backend_of(name).missing() is None)


def load(
    source: str | Path | ModelSource,
    backend: Any = None,
    *,
    skeleton: Callable[[dict[str, Any]], nn.Module] | type[nn.Module] | None = None,
    component: str | None = None,
    revision: str | None = None,
    device: str | torch.device = "auto",
    device_map: Any = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    compute_dtype: str | torch.dtype | None = None,
    skip_modules: str | Iterable[str] = (),
    keep_in_fp32_modules: Iterable[str] = (),
    plain_fp8: bool = False,
    offload_folder: str | Path | None = None,
    workers: int | None = None,
    in_flight_mib: int = 64,
    map: bool | str = "auto",
    cache: str | Path | None = None,
    cache_gib: float | None = None,
) -> nn.Module:
    """Load a model, each weight quantized as it is read: the dense model is never in memory.

    source: a checkpoint (a folder with config.json and safetensors, sharded or not; a .safetensors or .gguf file), the
        folder of a pipeline of diffusers, a hub's repository with one of these ("user/name"; what is missing is
        downloaded to huggingface_hub's cache), the name of a model source with a model of its own ("digits"), or a
        model source.
    backend: a name of `backends()`; "@recipe.yaml", rules for layers (docs/mixed.md); a backend's config, such as
        `BitsAndBytesConfig(load_in_4bit=True)`, or one of diffusers' or transformers'; a mapping with `quant_method`;
        None does not quantize. A checkpoint that is quantized already is loaded as it is, with a warning if something
        else was asked for.
    skeleton: what builds the network, without weights: a class, which gets config.json's fields as keywords, or a
        function of the parsed config.json. None: the class of diffusers or transformers that config.json names.
    component: of a source with several: of a pipeline "transformer", for example (`load_pipeline` loads all of it).
    revision: of a hub's repository: a branch, a tag or a commit; None is main.
    device: "auto" (the first GPU, else the CPU), or a device.
    device_map: "auto", "balanced", "balanced_low_0", "sequential", or a map of modules to devices, "cpu" and "disk", as
        in diffusers, but planned by quantized bytes; max_memory: bytes, or "10GiB", for each of them; offload_folder:
        for what goes to disk. What rests where it does not compute is offloaded: `remove_offload` ends that.
    compute_dtype: of activations and unquantized weights; None is the checkpoint's own.
    skip_modules, keep_in_fp32_modules: patterns of modules to leave unquantized, or in fp32: "proj_out", "blocks.0",
        "**.norm"; "@file" has one a line. A pattern that matches nothing is an error. Left unquantized as well is
        what the command line leaves out of the embedded models ("digits": x_embed and proj_out), and of a folder of
        transformers the output embedding (lm_head); `skeleton`, or a model source, leaves out nothing by itself.
    plain_fp8: of a checkpoint with weights in float8 and no scales: they are a plain cast. Else that is an error.
    workers: threads that read and quantize, None is one a core; in_flight_mib: MiB of tensors read whole and not yet
        done with.
    map: "auto" maps weights that stay on the CPU as they are in their file, if they are aligned, in place of reading
        them; True says which are not; False reads all. Changing a mapped weight in place does not change the file. Who
        truncates a mapped file kills this process with SIGBUS at the next access: replace files, or load with False.
    cache: a folder that keeps quantized weights, so that a second load of them costs a mapping; cache_gib: its limit,
        None is a tenth of the free disk (docs/loading.md).

    Raises: ConfigError (a ValueError), MissingLibraryError (an ImportError), UnsupportedError for what this machine
    cannot run, LoadError for a checkpoint that is damaged or does not fit. Most come before a weight is read.
    """
    from qexp.loading.component import CacheFolder
    from qexp.loading.lifecycle import load_component

    if skeleton is not None and not callable(skeleton):
        raise ConfigError(f"skeleton={skeleton!r} must be a class or a function that builds the network, or None")
    model_source, left_out = _source(source, skeleton, revision)
    loader = loader_settings(in_flight_mib=in_flight_mib, workers=workers, map=map, cache=cache, cache_gib=cache_gib)
    place, places, limits = places_of(device, device_map, max_memory)
    settings = parse_component(
        {
            "backend": backend,
            "skip_modules": skip_modules,
            "keep_in_fp32_modules": keep_in_fp32_modules,
            "compute_dtype": compute_dtype,
            "plain_fp8": plain_fp8,
        },
        to_backend=backend_config,
    )
    settings = replace(settings, skip_modules=union(settings.skip_modules, left_out))
    loaded = load_component(
        model_source,
        _component(model_source, component),
        settings,
        device=place,
        loader=loader,
        cache=CacheFolder.of(loader),
        device_map=places,
        max_memory=limits,
        store=None if offload_folder is None else Path(offload_folder),
        warms_up_first=False,
    )
    return loaded.model


def offload(
    model: nn.Module,
    strategy: str | OffloadConfig = "leaf",
    device: str | torch.device = "auto",
    *,
    to: str = "auto",
    folder: str | Path | None = None,
    block_lists: Iterable[str] | None = None,
    **settings: Any,
) -> Offload:
    """Move a model's weights to CPU memory or disk, and have them travel to `device` when they are needed.

    The model then runs as before, on inputs on `device`, with the same outputs to the last bit, for any backend.

    strategy: "leaf" (module by module, fetched ahead), "block" (so many blocks at a time), "sequential" (module by
        module, when it runs) or "model" (all at once); or a whole `OffloadConfig`.
    to: "cpu", "disk", or "auto": the CPU where there is an accelerator, else the disk.
    folder: for the files on disk, which are removed with the offload; None is the system's folder for such.
    block_lists: dotted names of the module lists that hold blocks; None is every outermost one.
    settings: other fields of `OffloadConfig`, such as num_blocks_per_group=2 or resident_gib=4.0.

    Returns: an `Offload`, whose `statistics()` say what rests where and what has travelled (in GiB).
    Raises: ConfigError for a conflict, DiskError if weights cannot be written; the model is then as it was.
    """
    import torch

    from qexp.offloading.grouping import outermost_lists
    from qexp.offloading.strategies import apply_offload

    check_model(model, "offload")
    device = named(device)
    place = torch.device(resolve_device(device) if isinstance(device, str) else device)
    if isinstance(block_lists, str):
        raise ConfigError(f"block_lists={block_lists!r} must be a list of names, such as [{block_lists!r}]")
    _check_known(settings)
    config = strategy if isinstance(strategy, OffloadConfig) else OffloadConfig(strategy, to, **settings)
    config = config.resolved(place.type)
    store = expanded(folder, "folder") if folder is not None else Path(tempfile.gettempdir()) / "qexp-offload"
    lists = outermost_lists(model) if block_lists is None else list(block_lists)
    return apply_offload(model, config, device=place, block_lists=lists, store=store)


def remove_offload(model: nn.Module) -> nn.Module:
    """Bring an offloaded model's weights back to where they were before. Raises: ConfigError if it is not offloaded."""
    from qexp.offloading.strategies import offload_of

    check_model(model, "remove_offload")
    found = offload_of(model)
    if found is None:
        raise ConfigError(f"remove_offload: this {type(model).__name__} is not offloaded; qexp.offload() does that")
    found.remove()
    return model


def save(
    model: Any,
    folder: str | Path,
    *,
    max_shard_gib: float = 5.0,
    interchange: bool = False,
    layout: str | None = None,
) -> list[Path]:
    """Save a model that `load` returned, or a pipeline of `load_pipeline`, wherever its weights rest now.

    What is written, `load` opens without a backend; so do diffusers and transformers, for formats that they know.
    max_shard_gib: of one file of weights. interchange: keep the format's own name also where transformers would open
    the model with other weights (quanto), with a warning; else it is saved under a name that transformers refuses.
    layout: "file" for GGUF with the names and groups of tensors of the checkpoint's file, which ComfyUI reads.
    Returns: the files written.
    Raises: ConfigError for a model that was loaded by something else, DiskError if it cannot be written.
    """
    from qexp.loading.saving import layouts_of, save_model

    place = expanded(folder, "folder")
    asked = {"path": str(place), "max_shard_gib": max_shard_gib, "layout": layout}
    max_shard_bytes = int(from_plain(SaveConfig, asked, "save").max_shard_gib * GIB)
    write = partial(save_model, max_shard_bytes=max_shard_bytes, interchange=interchange)
    source = getattr(model, SOURCE, None)
    if source is None:
        check_model(model, "save")
        return write(model, place, layout=layout)
    models = {name: getattr(model, name) for name in source.components()}
    for name, one in models.items():  # before any of them is written
        checkpoint = getattr(one, "checkpoint_path", None)
        if checkpoint is not None:
            refuse_source(place / name, checkpoint, "save")
    layouts = layouts_of(models, layout)
    files = [file for name, own in layouts.items() for file in write(models[name], place / name, layout=own)]
    return [*source.save_side_files(place), *files]


def memory_footprint(model: nn.Module) -> int:
    """Return bytes that a model's parameters and buffers really occupy, on all devices and on disk.

    Inner tensors, scales and quant states are counted, memory that they share is counted once.
    """
    from qexp.offloading.payload import module_nbytes

    check_model(model, "memory_footprint")
    return module_nbytes(model)


def _source(source: Any, skeleton: Any, revision: str | None) -> tuple[Any, tuple[str, ...]]:
    """Return a model source, and the patterns that its option of conf/model leaves unquantized.

    A name is one of the sources that need no path, unless there is a file or folder so called.
    """
    if isinstance(source, str) and (revision is not None or hub_id(source) is not None):
        source = local_folder(pinned(source, revision, place="source"))
    elif revision is not None:
        raise ConfigError(f"revision={revision} is of a hub's repository, and source={source!r} is none; leave it out")
    if not isinstance(source, str | Path):
        if not isinstance(source, ModelSource):
            raise ConfigError(
                f"source={source!r} is no source; give a path, the name of a model, or an object of a subclass of "
                "qexp.models.base.ModelSource"
            )
        return source, ()
    path = expanded(source, "source")
    if isinstance(source, str) and source in plugin_names("model") and not path.exists():
        return load_source(plugin_module("model", source).Config()), model_skip_modules(source)
    if isinstance(source, str) and not path.exists() and (hint := did_you_mean(source, plugin_names("model"))):
        raise LoadError(
            f"source={source!r}{hint} is no file or folder; use a path, or {choices(plugin_names('model'))}"
        )
    from qexp.models.folder import FolderSource

    if (path / INDEX).is_file():
        return load_source(DiffusersConfig(path=str(path))), ()
    return FolderSource(path, skeleton), ()


def _component(source: ModelSource, asked: str | None) -> str:
    names = list(source.checkpoints())
    if asked in names:
        return str(asked)
    if asked is None and len(names) == 1:
        return names[0]
    whole = ", or qexp.load_pipeline for all of them" if asked is None else ""
    raise ConfigError(f"component={asked!r} is none of this source's: use {choices(names)}{whole}")


def _check_known(settings: Mapping[str, Any]) -> None:
    """Raise ConfigError for a keyword of `offload` that is no field of `OffloadConfig`."""
    known = [field.name for field in fields(OffloadConfig) if field.name not in ("strategy", "to")]
    for name in settings:
        if name not in known:
            raise ConfigError(f"offload: {name} is no setting{did_you_mean(name, known)}; use {choices(known)}")
