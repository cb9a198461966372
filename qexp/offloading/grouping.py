"""Form the groups of modules that are copied together.

* model: everything is one group;
* leaf, sequential: each module without children is a group;
* block: `num_blocks_per_group` consecutive blocks of a block list are a group; modules outside the block lists are
  groups of their own, as for leaf.

A group's weights are on the compute device while one of its modules is in its forward. So what belongs directly to a
module that has children, outside blocks (a top-level position embedding, say), has no forward that tells when it
is needed, and stays on the device. Modules of torch that read their children's weights without calling them are one
group with their children. A module that two blocks share is a group of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence

from torch import nn

from qexp.config.offload import OffloadConfig
from qexp.errors import ConfigError, choices
from qexp.offloading.group import Group, Unit

INDIVISIBLE = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def plan_groups(model: nn.Module, config: OffloadConfig, block_lists: Sequence[str]) -> list[Group]:
    """Return the groups of a strategy. Raises ConfigError if a block list is missing, or nothing can be offloaded."""
    planned: list[tuple[str, list[Unit]]] = []
    taken: set[int] = set()
    if config.strategy == "model":
        every = list(model.modules())
        planned.append((type(model).__name__, [(model, every)]))
        taken.update(id(module) for module in every)
    if config.strategy == "block":
        lists = _block_lists(model, block_lists)
        users = Counter(id(part) for blocks in lists.values() for block in blocks for part in block.modules())
        for name, blocks in lists.items():
            for start in range(0, len(blocks), config.num_blocks_per_group):
                chunk = list(blocks)[start : start + config.num_blocks_per_group]
                units = [unit for block in chunk for unit in _block_units(block, users)]
                taken.update(id(owner) for _, owners in units for owner in owners)
                planned.append((f"{name}.{start}" + f"-{start + len(chunk) - 1}" * (len(chunk) > 1), units))
    planned += [(name, [unit]) for name, unit in _leaf_units(model) if id(unit[0]) not in taken]
    groups = [Group(name, units) for name, units in planned]
    groups = [group for group in groups if any(group.sites)]
    if not groups:
        raise ConfigError(f"offload.strategy={config.strategy!r}: {type(model).__name__} has no weights to offload")
    return groups


def outermost_lists(model: nn.Module) -> list[str]:
    """Return the dotted names of the outermost module lists, which hold the blocks of most networks."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)]
    return [name for name in names if name and not any(name.startswith(f"{other}.") for other in names)]


def units_of(
    model: nn.Module, whole: Collection[str], goes_together: Callable[[str], bool]
) -> Iterator[tuple[str, list[Unit]]]:
    """Yield the smallest groups of modules by name: those of the classes in `whole`, and leaf modules everywhere else.

    goes_together: name of a module -> whether all of it may be in one group.
    """
    blocks: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        above = ["", *(name[:end] for end, mark in enumerate(name) if mark == ".")]
        if not any(outer in blocks for outer in above) and type(module).__name__ in whole and goes_together(name):
            blocks[name] = module
    users = Counter(id(part) for block in blocks.values() for part in block.modules())
    taken: set[int] = set()
    for name, block in blocks.items():
        units = list(_block_units(block, users))
        taken.update(id(owner) for _, owners in units for owner in owners)
        yield name, units
    for name, unit in _leaf_units(model):
        if id(unit[0]) not in taken and goes_together(name):
            yield name, [unit]


def is_called(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward  # containers (ModuleList, ParameterList) are not


def called_children(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the called modules directly below a module, including those in containers."""
    for child in module.children():
        if is_called(child):
            yield child
        else:
            yield from called_children(child)


def _leaf_units(model: nn.Module) -> Iterator[tuple[str, Unit]]:
    covered: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in covered or not is_called(module):
            continue
        if isinstance(module, INDIVISIBLE):
            covered.update(id(part) for part in module.modules())
            yield name, (module, list(module.modules()))
        elif not any(True for _ in module.children()):
            yield name, (module, [module])


def _block_units(block: nn.Module, users: Counter[int]) -> Iterator[Unit]:
    """Yield a block with its tensors; for a block that is a mere container, the modules in it that are called."""
    if is_called(block):
        yield block, [part for part in block.modules() if users[id(part)] == 1]
    else:
        for child in block.children():
            yield from _block_units(child, users)


def _block_lists(model: nn.Module, names: Sequence[str]) -> dict[str, nn.ModuleList]:
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and name}
    kind = type(model).__name__
    remedy = f"use {choices(lists)}, or offload=leaf" if lists else f"{kind} has no nn.ModuleList; use offload=leaf"
    if not names:
        raise ConfigError(f"offload.strategy='block' needs block lists, and the model source names none; {remedy}")
    for name in names:
        if name not in lists:
            raise ConfigError(f"offload.strategy='block': '{name}' is not an nn.ModuleList of {kind}; {remedy}")
    return {name: lists[name] for name in names}
