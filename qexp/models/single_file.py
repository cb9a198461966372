"""Other names for the tensors of diffusers' models, by its own functions.

Files of single models are in their authors' layout (also ComfyUI's): there is a function for each architecture. It is
for no other file: of diffusers' own names it would make a mess, without an error. Files of old call the layers of some
attention blocks otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from typing import TYPE_CHECKING, Any

from qexp.quantizers.layers import paths_above

if TYPE_CHECKING:
    from torch import nn

    from qexp.checkpoints.checkpoint import Checkpoint
    from qexp.checkpoints.conversion import Conversion


def diffusers_conversion(model: Any, checkpoint: Checkpoint) -> Conversion:
    """Return the conversion of a checkpoint's tensors to the current names of the class of `model`."""
    needs_none = is_diffusers_own(checkpoint) or has_own_names(model, checkpoint.entries)
    single = None if needs_none else single_file_conversion(model)

    def conversion(tensors: MutableMapping[str, Any]) -> Any:
        tensors = model._fix_state_dict_keys_on_load(tensors)
        return single(tensors) if single is not None else {}  # what is left keeps its name

    return conversion


def single_file_conversion(model: nn.Module) -> Conversion | None:
    """diffusers' function that converts a single file for the class of `model`; None if it has none."""
    from diffusers.loaders import single_file_model

    name = single_file_model._get_single_file_loadable_mapping_class(type(model))
    if name is None:
        return None
    convert: Any = single_file_model.SINGLE_FILE_LOADABLE_CLASSES[name]["checkpoint_mapping_fn"]
    config: Any = getattr(model, "config", None)

    def conversion(tensors: MutableMapping[str, Any]) -> Any:
        return convert(checkpoint=tensors, config=dict(config or {}))

    return conversion


def is_diffusers_own(checkpoint: Checkpoint) -> bool:
    """Return whether `save_pretrained` of diffusers wrote this: by the names of files, and a config with a class."""
    is_named_so = all(file.name.startswith("diffusion_pytorch_model") for file in checkpoint.files)
    return not checkpoint.path.is_file() and is_named_so and "_class_name" in checkpoint.config


def has_own_names(model: nn.Module, names: Iterable[str]) -> bool:
    """Return whether tensors are called as the model calls them: each is of one of its layers, or every layer has some.

    A layer's tensors may be other ones than its own where they hold a quantized weight: `to_q._weight_qdata`.
    """
    layers = {path for path, module in model.named_modules(remove_duplicate=False) if _is_layer(module)}
    distinct, own = {path for path, module in model.named_modules() if _is_layer(module)}, model.state_dict().keys()
    found = {name: next((path for path in paths_above(name) if path in layers), None) for name in names}
    return all(found[name] is not None or name in own for name in found) or distinct <= set(found.values())


def _is_layer(module: nn.Module) -> bool:
    return bool(module.state_dict()) and next(module.children(), None) is None
