"""Rename and reshape a checkpoint's tensors by a library's conversion, recorded without reading a byte.

Files of single models often keep their authors' layout: q, k and v in one matrix, shift before scale; checkpoints of
mixtures keep every expert by itself where the network has one tensor for all. A library has functions that take such
tensors and return its own: `converted` calls them with tensors that have no data (`lazy_tensor.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import replace
from typing import Any

from qexp.checkpoints.checkpoint import Checkpoint
from qexp.checkpoints.lazy_tensor import Lazy
from qexp.checkpoints.tensor_entry import TensorEntry
from qexp.errors import LoadError

Conversion = Callable[[MutableMapping[str, Any]], Mapping[str, Any]]


def converted(checkpoint: Checkpoint, conversion: Conversion) -> Checkpoint:
    """Return the checkpoint with converted tensors; those that `conversion` does not use keep their names.

    conversion: takes a dict, from which it may pop, and returns one.
    Raises: LoadError if the conversion fails, as it does for the tensors of another model.
    """
    state: dict[str, Any] = {name: Lazy.of(entry) for name, entry in checkpoint.entries.items()}
    try:
        result = conversion(state)
    except (LookupError, ValueError, TypeError, AttributeError, AssertionError) as error:
        name = getattr(conversion, "__name__", "the conversion")
        raise LoadError(
            f"{name} cannot convert the tensors of '{checkpoint.path}' ({type(error).__name__}: {error}): the file "
            "belongs to another model; check its config.json"
        ) from error
    entries = {name: tensor.entry(name) for name, tensor in {**state, **result}.items()}
    converted_names = checkpoint.converted_names | (checkpoint.entries.keys() - entries.keys())
    return replace(checkpoint, entries=entries, converted_names=converted_names)


def transposed(entry: TensorEntry) -> TensorEntry:
    """Return the entry of a transposed matrix of plain numbers."""
    return Lazy.of(entry).t().entry(entry.name)
