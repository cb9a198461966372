"""A checkpoint under the names, and in the shapes, that a network has for its tensors.

Four things differ between files of the same weights. The names, where the file is in its authors' layout: see the
source's conversion. Segments in the middle of names, of a wrapper around a part of the network (torch.compile, FSDP,
activation checkpointing, DataParallel): they are taken out. A prefix of all names, left by a wrapper whose state_dict
was saved (`module.` of DistributedDataParallel, `_orig_mod.` of torch.compile, `transformer.`, `model.`): it is taken
off if no tensor has a place in the network with it. And dimensions of one, which GGUF files leave out ([D] for [1, D]).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

from torch import nn

from qexp.checkpoints.checkpoint import Checkpoint, is_gguf
from qexp.checkpoints.conversion import converted
from qexp.checkpoints.tensor_entry import TensorEntry
from qexp.errors import LoadError
from qexp.models.base import ModelSource

# what torch.compile, FSDP and activation checkpointing call the module that they wrap
WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def under_model_names(source: ModelSource, component: str, checkpoint: Checkpoint, model: nn.Module) -> Checkpoint:
    """Return the checkpoint with tensors named and shaped as the model's, as far as that can be done.

    A prefix is taken off only if no tensor has a place in the model with it, and some have without it.
    """
    first_error: LoadError | None = None
    as_written = checkpoint
    for candidate in (checkpoint, *_without_prefixes(checkpoint)):
        try:
            named = _converted_by_source(source, component, _without_wrappers(candidate, model), model)
        except LoadError as error:  # a conversion may look for names that are behind a prefix
            first_error = first_error or error
            continue
        if _has_places(named, model):
            return _in_model_shapes(named, model)
        as_written = named if candidate is checkpoint else as_written
    if first_error is not None:
        raise first_error
    return as_written


def _converted_by_source(source: ModelSource, component: str, checkpoint: Checkpoint, model: nn.Module) -> Checkpoint:
    """Return the checkpoint, converted by the source where a name or shape is not the model's."""
    entries = checkpoint.entries
    if all(name in entries and entries[name].shape == t.shape for name, t in model.state_dict().items()):
        return checkpoint
    conversion = source.conversion(component, model, checkpoint)
    return checkpoint if conversion is None else converted(checkpoint, conversion)


def _without_wrappers(checkpoint: Checkpoint, model: nn.Module) -> Checkpoint:
    """Return the checkpoint without the segments of wrappers, where the network has no such names itself.

    `module` is also a name that authors give: it goes only from the middle of a name, where the rest is one of the
    model's tensors or layers.
    """
    places = _names_of_places(model)
    own = {segment for name in places for segment in name.split(".")}
    names = dict[str, str]()
    for name in checkpoint.entries:
        bare = _without_segments(name, WRAPPERS - own)
        first, dot, rest = bare.partition(".")
        plain = first + dot + _without_segments(rest, {"module"} - own)
        is_place = plain in places or plain.rpartition(".")[0] in places
        names[name] = plain if is_place else bare
    if all(name == bare for name, bare in names.items()) or len({*names.values()}) < len(names):
        return checkpoint
    return _renamed(checkpoint, names)


def _without_segments(name: str, segments: Collection[str]) -> str:
    return ".".join(segment for segment in name.split(".") if segment not in segments)


def _without_prefixes(checkpoint: Checkpoint) -> Iterator[Checkpoint]:
    """Yield the checkpoint without the first segment of its names, the first two, …: as long as all have the same
    one."""
    prefix = ""
    while True:
        segments = {name[len(prefix) :].partition(".")[0] for name in checkpoint.entries}
        if len(segments) != 1 or any(name == prefix + s for s in segments for name in checkpoint.entries):
            return
        prefix += f"{segments.pop()}."
        yield _renamed(checkpoint, {name: name.removeprefix(prefix) for name in checkpoint.entries})


def _renamed(checkpoint: Checkpoint, names: Mapping[str, str]) -> Checkpoint:
    return converted(checkpoint, lambda tensors: {names[name]: tensors.pop(name) for name in list(tensors)})


def _has_places(checkpoint: Checkpoint, model: nn.Module) -> bool:
    """Return whether any tensor is one of the model's, or a part of a quantized weight of one of its layers."""
    names = _names_of_places(model)
    return any(name in names or name.rpartition(".")[0] in names for name in checkpoint.entries)


def _names_of_places(model: nn.Module) -> set[str]:
    """Return names of the model's modules and tensors."""
    return {name for name, _ in model.named_modules(remove_duplicate=False)} - {""} | model.state_dict().keys()


def _in_model_shapes(checkpoint: Checkpoint, model: nn.Module) -> Checkpoint:
    """GGUF tensors with the dimensions of one that the model has, where these alone differ."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    entries = {
        name: _reshaped(entry, shapes[name]) if name in shapes and is_gguf(entry.file) else entry
        for name, entry in checkpoint.entries.items()
    }
    return replace(checkpoint, entries=entries)


def _reshaped(entry: TensorEntry, shape: tuple[int, ...]) -> TensorEntry:
    differs_by_ones = [size for size in entry.shape if size != 1] == [size for size in shape if size != 1]
    if entry.transform is not None or len(entry.shape) == len(shape) or not differs_by_ones:
        return entry
    return replace(entry, shape=shape)
