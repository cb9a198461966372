"""Files of single models in their authors' layout (also ComfyUI's): diffusers' function for each architecture."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from qexp.loading.conversion import Conversion


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
