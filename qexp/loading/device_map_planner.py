"""Which device each module goes to: accelerate's `infer_auto_device_map`, given the bytes that each tensor will have.

accelerate multiplies elements by one dtype's size, which is wrong for packed weights. It is therefore shown a copy of
the model without weights: each tensor is a parameter of uint8 on the meta device, with as many elements as the loaded
tensor has bytes. The copy also avoids its gaps:

- Buffers of a module that it splits get no device: in the copy they are parameters.
- It raises IndexError for a tied parameter of a module that it splits, for chains of ties (A with B, B with C), and
  where a module's name is a part of a tied parameter's. In the copy a tied tensor of a module with children is a module
  itself, all tied tensors of a model are tied to each other, and full names begin with a mark.
- get_balanced_memory fails without accelerator 0: in the copy's limits, accelerators are numbered from 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

import torch
from torch import nn

from qexp.system.device_names import DISK, Key

MARK = "/"  # before a full name
TIE = "/tie"  # an empty parameter that all modules with tied tensors share


def plan_devices(
    model: nn.Module,
    nbytes: Mapping[str, int],
    tied: Mapping[str, str],
    device_map: str,
    limits: Mapping[Key, int],
    no_split: Collection[str],
) -> dict[str, Key]:
    """Return the device of each module or tensor that is kept whole, in the order of the model.

    Args:
        nbytes: full name of each parameter and buffer -> bytes once it is loaded.
        tied: parameter -> the one that it is the same as; those that are one object need not be named.
        device_map: "auto", "balanced", "balanced_low_0" or "sequential".
        limits: bytes of each device. The disk takes what is left, whether it is named or not.
        no_split: classes of modules that stay on one device.
    """
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    accelerators = dict(enumerate(sorted(key for key in limits if isinstance(key, int))))
    numbers: dict[Key, int] = {key: number for number, key in accelerators.items()}
    rooms = {numbers.get(key, key): room for key, room in limits.items() if key != DISK}
    sizes, classes = _copy_sizes(model, nbytes, tied, no_split), list(no_split)
    if device_map != "sequential":
        rooms = get_balanced_memory(sizes, rooms, classes, low_zero=device_map == "balanced_low_0")
    # with offload_buffers it does not warn of buffers, of which the copy has none
    found = infer_auto_device_map(sizes, rooms, no_split_module_classes=classes, offload_buffers=True)
    placed = {name.removeprefix(MARK): accelerators.get(key, key) for name, key in found.items()}
    return {name: placed[name] for name in list_names(model) if name in placed}  # accelerate's order is that of a set


def list_names(model: nn.Module) -> dict[str, None]:
    """Return the full names of all modules and tensors, in order, as the keys of a dictionary."""
    names: dict[str, None] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names[name] = None
        prefix = f"{name}." if name else ""
        names.update({prefix + own: None for own in (*module._parameters, *module._buffers)})
    return names


def _copy_sizes(
    model: nn.Module, nbytes: Mapping[str, int], tied: Mapping[str, str], no_split: Collection[str]
) -> nn.Module:
    """Return modules of the same structure and classes' names, with parameters of uint8 in place of all tensors."""
    first_name = _name_tensors_once(model, tied)
    uses = Counter(first_name.values())
    classes = {kind: type(kind, (nn.Module,), {}) for kind in no_split}
    tie, counted = nn.Parameter(torch.empty(0, device="meta")), set[str]()

    def copy(path: str, module: nn.Module) -> nn.Module:
        result, prefix = classes.get(type(module).__name__, nn.Module)(), f"{path}." if path else ""
        mark = "" if path else MARK
        for own in (own for own in (*module._parameters, *module._buffers) if prefix + own in first_name):
            owner, first = result, first_name[prefix + own]
            if uses[first] > 1 and module._modules:
                owner = nn.Module()
                result.add_module(mark + own, owner)
            if uses[first] > 1:
                owner.register_parameter(TIE, tie)
            size = 0 if first in counted else nbytes[first]
            counted.add(first)
            data = torch.empty(size, dtype=torch.uint8, device="meta")
            owner.register_parameter(mark + own, nn.Parameter(data, requires_grad=False))
        for child, part in module._modules.items():
            if part is not None:
                result.add_module(mark + child, copy(prefix + child, part))
        return result

    return copy("", model)


def _name_tensors_once(model: nn.Module, tied: Mapping[str, str]) -> dict[str, str]:
    """Return for each parameter and buffer the first name of it or of the one that it is tied to."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    first_of: dict[int, str] = {}
    for name, tensor in named:
        first_of.setdefault(id(tensor), tied.get(name, name))
    return {name: tied.get(name, first_of[id(tensor)]) for name, tensor in named}
