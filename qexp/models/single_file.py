"""Other names for the tensors of diffusers' models, by its own functions.

Files of single models are in their authors' layout (also ComfyUI's): there is a function for each architecture. Files
of old call the layers of some attention blocks otherwise.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from qexp.checkpoints.conversion import Conversion


def diffusers_conversion(model: Any) -> Conversion:
    """What gives the tensors of any file for the class of `model` their names of today."""
    single = single_file_conversion(model)

    def conversion(tensors: MutableMapping[str, Any]) -> Any:
        tensors = model._fix_state_dict_keys_on_load(tensors)
        return single(tensors) if single is not None else {}  # what is left keeps its name

    return conversion


def single_file_conversion(model: nn.Module) -> Conversion | None:
    """diffusers' function that converts such a file for the class of `model`; None if it has none.

    A checkpoint that has most of the model's names already (a quantized one lacks some) is left as it is.
    """
    from diffusers.loaders import single_file_model

    name = single_file_model._get_single_file_loadable_mapping_class(type(model))
    if name is None:
        return None
    convert: Any = single_file_model.SINGLE_FILE_LOADABLE_CLASSES[name]["checkpoint_mapping_fn"]
    config: Any = getattr(model, "config", None)
    known = model.state_dict().keys()

    def conversion(tensors: MutableMapping[str, Any]) -> Any:
        if 2 * len(known & tensors.keys()) > len(known):
            return {name: tensors.pop(name) for name in list(tensors)}
        return convert(checkpoint=tensors, config=dict(config or {}))

    return conversion
