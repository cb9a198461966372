"""Choose the weights that are mapped, in place of read: those that stay as they are in their file, and on the CPU.

Nothing of them is copied, so that loading them takes no time and their memory is the page cache's, which processes
share. A tensor is mapped if its address is a multiple of what its kernels take for granted
(`Quantizer.stored_alignment`); others are copied, so that outputs do not depend on how a file is laid out. Files that
qexp saves are laid out so that whatever has a multiple of 64 bytes is aligned (`checkpoints/safetensors_file.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from qexp.loading.plan import LoadPlan
from qexp.loading.streaming.mapped_files import can_map
from qexp.loading.work_item import WorkItem
from qexp.quantizers.base import Quantizer
from qexp.system.memory import MIB
from qexp.system.screen import say


def choose_mapped(plan: LoadPlan, quantizer: Quantizer, setting: bool | str, component: str) -> LoadPlan:
    """Return the plan with what is to be mapped, as `loader.map` says; with true, say what is not, and why."""
    if setting is False:
        return plan
    found = {entry.file for item in plan.items if _stays(item) for entry in item.entries}
    refused = {file for file in found if not can_map(file)}
    mapped_places, items = set[tuple[Path, int]](), list[WorkItem]()
    for item in plan.items:
        mapped = _mapped(item, quantizer) if item.target not in plan.tied else item
        places = {(entry.file, entry.offset) for entry in mapped.mapped}
        # a tensor under two names of a file's would be one piece of memory, where a copy makes two
        if places & mapped_places or any(file in refused for file, _ in places):
            mapped = item
        mapped_places |= {(entry.file, entry.offset) for entry in mapped.mapped}
        items.append(mapped)
    if setting is True:
        say(_explain(plan.items, items, component))
    return replace(plan, items=tuple(items))


def _stays(item: WorkItem) -> bool:
    return item.read == "in_place" and item.device.type == "cpu"


def _mapped(item: WorkItem, quantizer: Quantizer) -> WorkItem:
    if not _stays(item):
        return item
    alignment = item.alignment if item.spec is None else quantizer.stored_alignment(item.spec)
    mapped = replace(item, read="mapped", alignment=alignment)
    return mapped if mapped.mapped else item


def _explain(before: Sequence[WorkItem], after: Sequence[WorkItem], component: str) -> str:
    """Say how much is mapped, and why the rest is not."""
    nbytes = sum(item.nbytes for item in before)
    staying = sum(item.nbytes for item in before if _stays(item))
    mapped = sum(entry.nbytes for item in after for entry in item.mapped)
    rest = {"change, or go elsewhere": nbytes - staying, "are not aligned in their file": staying - mapped}
    why = "".join(f"; {size / MIB:,.1f} MiB are read, since they {reason}" for reason, size in rest.items() if size)
    return f"{component}: loader.map=true: {mapped / MIB:,.1f} of {nbytes / MIB:,.1f} MiB are mapped{why}"
