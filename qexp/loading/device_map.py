"""Where each part of a model rests and where it computes: `device_map`, with the values that accelerate gives it.

    null, a device          everything there
    auto, balanced          as evenly over the accelerators as it fits, then the CPU, then the disk
    balanced_low_0          the same with as little as possible on accelerator 0
    sequential              accelerator after accelerator, each filled before the next
    {"blocks.0": 0, …}      module (or tensor) by module; "" stands for everything not named

A plan counts the bytes that the weights will have once they are quantized. Where there is an accelerator, what is put
on the CPU or on disk only rests there: it travels to an accelerator when it runs. Modules of a planned map travel to
the first accelerator, where room was kept for them, those of an explicit map to the one that the map names last
before them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from qexp.errors import ConfigError, choices, did_you_mean, first_names
from qexp.loading.device_map_planner import list_names, plan_devices
from qexp.loading.plan import LoadPlan
from qexp.offloading.grouping import INDIVISIBLE
from qexp.offloading.placement import Placement
from qexp.quantizers.base import Quantizer
from qexp.system.device_names import CPU, DISK, MaxMemory, Place, device_of_key, limits_of, parse_place, place_of_key
from qexp.system.devices import PLANNED_DEVICE_MAPS

GIB = 2**30
EVERYTHING = "'*' (in Python also '') for all that is not named"

DeviceMap = str | int | torch.device | Mapping[str, int | str | torch.device] | Mapping[str, Place] | None


def main_device(device_map: DeviceMap, device: torch.device) -> torch.device:
    """Return the device that decides what a model can be loaded as: the first accelerator of a map, or else the CPU."""
    if device_map is None or device_map in PLANNED_DEVICE_MAPS:
        return device
    named = list(device_map.values()) if isinstance(device_map, Mapping) else [device_map]
    places = [parse_place(value, device) for value in named]
    devices = [place for place in places if isinstance(place, torch.device)]
    return next((found for found in devices if found.type != "cpu"), torch.device("cpu"))


def place(
    model: nn.Module,
    plan: LoadPlan,
    device_map: DeviceMap,
    device: torch.device,
    max_memory: MaxMemory,
    no_split: Collection[str],
    *,
    travels: bool = True,
) -> Placement:
    """Place the parts of a skeleton on devices.

    device: `main_device` of the map; no_split: `no_split_classes`;
    travels: whether what rests on the CPU or on disk computes on an accelerator, where the map has one.
    Raises: ConfigError for a map that leaves something out, names something unknown, or exceeds the memory.
    """
    nbytes = tensor_nbytes(model, plan)
    if device_map is None:
        return Placement(device, {"": device}, {"": device}, nbytes, {}, plan.tied)
    limits = limits_of(max_memory, device)
    if isinstance(device_map, str) and device_map in PLANNED_DEVICE_MAPS:
        # of an accelerator's free memory, a tenth is left for what computing needs, as accelerate does for a single one
        accelerators = [key for key in limits if isinstance(key, int)]
        if max_memory is None and len(accelerators) == 1 and device_map != "sequential":
            limits[accelerators[0]] = int(0.9 * limits[accelerators[0]])
        planned = plan_devices(model, nbytes, plan.tied, device_map, limits, no_split)
        places = {name: place_of_key(key, device) for name, key in planned.items()}
        main = device_of_key(accelerators[0] if accelerators else "cpu", device)
        computes = {name: main if isinstance(place, str) or place == CPU else place for name, place in places.items()}
    else:
        named = device_map if isinstance(device_map, Mapping) else {"": device_map}
        places = _explicit(model, nbytes, {name: parse_place(place, device) for name, place in named.items()})
        main, computes = device, _computes(places, device)
        if not travels:
            computes = {name: CPU if place in (CPU, DISK) else computes[name] for name, place in places.items()}
    placement = Placement(main, places, computes, nbytes, {}, plan.tied)
    used = placement.bytes_by_place()
    for key, limit in limits.items():
        found = str(place_of_key(key, device))
        if used.get(found, 0) > limit:
            raise ConfigError(
                f"device_map={device_map} puts {used[found] / GIB:.6f} GiB on {found}, which has "
                f"{limit / GIB:.6f} GiB {'by max_memory' if max_memory is not None else 'free'}; "
                "put less there, raise max_memory, or use a smaller quantization type"
            )
    devices = {device_of_key(key, device): float(limit) for key, limit in limits.items() if key != DISK}
    return replace(placement, room={place: limit - used.get(str(place), 0) for place, limit in devices.items()})


def no_split_classes(model: nn.Module, block_lists: Sequence[str]) -> set[str]:
    """Return classes of modules that stay on one device: what the model says (`_no_split_modules`), or else its blocks.

    Modules of torch that read the weights of their children are always among them.
    """
    named = {kind for module in model.modules() for kind in getattr(module, "_no_split_modules", None) or ()}
    if not named:
        blocks = [block for name in block_lists for block in model.get_submodule(name).children()]
        named = {type(block).__name__ for block in blocks}
    return named | {type(module).__name__ for module in model.modules() if isinstance(module, INDIVISIBLE)}


def tensor_nbytes(model: nn.Module, plan: LoadPlan) -> dict[str, int]:
    """Full name of each parameter and buffer of a skeleton -> bytes once it is loaded."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    planned = {item.target: item.result_nbytes for item in plan.items}
    return {name: planned.get(name, tensor.nbytes) for name, tensor in tensors}


def to_keep_in_fp32(model: nn.Module, quantizer: Quantizer, placement: Placement) -> list[str]:
    """Return the outermost modules that are on the CPU or on disk as a whole.

    `llm_int8_enable_fp32_cpu_offload` leaves them unquantized.

    Raises: ConfigError for a checkpoint that holds them quantized.
    """
    if placement.main == CPU or not getattr(quantizer.config, "llm_int8_enable_fp32_cpu_offload", False):
        return []
    spilled: list[str] = []
    for name, _ in model.named_modules(remove_duplicate=False):
        below = [tensor for tensor in placement.nbytes if tensor.startswith(f"{name}.")]
        inside = any(name.startswith(f"{outer}.") for outer in spilled)
        if below and not inside and all(placement.place_of(tensor) in (CPU, DISK) for tensor in below):
            spilled.append(name)
    if spilled and quantizer.stored:
        raise ConfigError(
            "llm_int8_enable_fp32_cpu_offload=true keeps what device_map puts on the CPU unquantized, and this "
            "checkpoint is quantized already; leave it out: quantized weights can rest there as well"
        )
    return spilled


def _explicit(model: nn.Module, nbytes: Mapping[str, int], places: Mapping[str, Place]) -> dict[str, Place]:
    """Return a user's map, in the order of the model. Raises: ConfigError if it cannot be followed."""
    order = list_names(model)
    for name in places:
        if name not in order:
            raise ConfigError(
                f"device_map names {name!r}, which is no module or tensor of {type(model).__name__}"
                f"{did_you_mean(name, order)}; use names as in model.named_modules(), or {EVERYTHING}"
            )
    placement = Placement(CPU, {name: places[name] for name in order if name in places}, {}, nbytes, {})
    if left_out := [name for name in nbytes if placement.entry(name) not in places]:
        shown = first_names(left_out)
        raise ConfigError(
            f"device_map gives no device for {len(left_out)} tensors: {shown}; name the modules that they belong to, "
            f"or use {EVERYTHING}"
        )
    names_of: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names_of.setdefault(id(module), []).append(name)
        below = (tensor for tensor in nbytes if tensor.startswith(f"{name}."))
        if isinstance(module, INDIVISIBLE) and len({placement.place_of(tensor) for tensor in below}) > 1:
            raise ConfigError(
                f"device_map splits '{name}', but {type(module).__name__} reads the weights of its parts itself; "
                "put it on one device as a whole"
            )
    for names in names_of.values():
        entries = [entry for name in names if (entry := placement.entry(name)) in places]
        if len(found := {str(places[entry]) for entry in entries}) > 1:
            raise ConfigError(
                f"device_map puts one and the same module, {choices(names)}, on {choices(found)}; use one"
            )
    return dict(placement.places)


def _computes(places: Mapping[str, Place], main: torch.device) -> dict[str, torch.device]:
    """Return the compute device of each entry of an explicit map, in the model's order."""
    computes, last = {}, main
    for name, place in places.items():
        if isinstance(place, torch.device) and (place.type != "cpu" or main.type == "cpu"):
            last = place
        computes[name] = last
    return computes
