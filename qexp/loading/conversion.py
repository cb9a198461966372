"""A checkpoint under other names: what a library's conversion function would do, recorded without reading a byte.

Files of single models often keep their authors' layout: q, k and v in one matrix, shift before scale. A library has a
function for each architecture that takes a dict of such tensors and returns a dict of its own. `converted` calls it
with `Rows`, which have shapes and no data and remember which rows of which tensors they are. Each tensor that comes out
is a list of pieces of the file, read one behind the other into their place; so blocks of quantized formats, of which
rows are whole, are converted like plain numbers and stay as they are.

What works on rows can be recorded: new names, `chunk`, `split` and slices along the first dimension, `cat` along it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from qexp.errors import LoadError
from qexp.loading.checkpoint import Checkpoint, TensorEntry

Conversion = Callable[[MutableMapping[str, Any]], Mapping[str, Any]]


def converted(checkpoint: Checkpoint, conversion: Conversion) -> Checkpoint:
    """The checkpoint with the tensors that `conversion` makes of its own; what it leaves over keeps its name.

    conversion: takes a dict, from which it may pop, and returns one.
    Raises: LoadError if it fails, which it does on tensors of another model.
    """
    state: dict[str, Any] = {name: Rows([entry]) for name, entry in checkpoint.entries.items()}
    try:
        result = conversion(state)
    except (LookupError, ValueError, TypeError, AttributeError, AssertionError) as error:
        name = getattr(conversion, "__name__", "the conversion")
        raise LoadError(
            f"the tensors of '{checkpoint.path}' are not those that {name} expects ({type(error).__name__}: {error}); "
            "the file belongs to another model: check its config.json"
        ) from error
    entries = {name: rows.entry(name) for name, rows in {**state, **result}.items()}
    return replace(checkpoint, entries=entries)


class Rows:
    """Consecutive rows of a tensor, or several such pieces one behind the other: no data, only where it lies.

    pieces: of one dtype and equal but for the first dimension.
    """

    def __init__(self, pieces: Sequence[TensorEntry]) -> None:
        self.pieces = list(pieces)

    @property
    def shape(self) -> torch.Size:
        first = self.pieces[0].shape
        return torch.Size((sum(piece.shape[0] for piece in self.pieces), *first[1:]) if first else ())

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def __len__(self) -> int:
        return self.shape[0]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise LoadError(f"'{self.pieces[0].name}' would have to be converted by `{name}`, which whole rows cannot be")

    def __getitem__(self, rows: slice) -> Rows:
        if not isinstance(rows, slice) or rows.step not in (None, 1):
            raise LoadError(f"'{self.pieces[0].name}' would have to be indexed by {rows!r}, not by whole rows")
        start, stop, _ = rows.indices(self.shape[0])
        found, position = [], 0
        for piece in self.pieces:
            low, high = max(start - position, 0), min(stop - position, piece.shape[0])
            if low < high:
                found.append(_rows_of(piece, low, high))
            position += piece.shape[0]
        return Rows(found or [_rows_of(self.pieces[0], 0, 0)])

    def split(self, sizes: int | Iterable[int], dim: int = 0) -> tuple[Rows, ...]:
        self._check_first(dim)
        total = self.shape[0]
        lengths = [min(sizes, total - at) for at in range(0, total, sizes)] if isinstance(sizes, int) else list(sizes)
        if sum(lengths) != total:
            raise ValueError(f"parts of {lengths} rows are not the {total} of '{self.pieces[0].name}'")
        ends = [sum(lengths[: number + 1]) for number in range(len(lengths))]
        return tuple(self[end - length : end] for end, length in zip(ends, lengths, strict=True))

    def chunk(self, chunks: int, dim: int = 0) -> tuple[Rows, ...]:
        return self.split(max(math.ceil(self.shape[0] / chunks), 1), dim)

    def _check_first(self, dim: int) -> None:
        if dim % max(self.ndim, 1) != 0:
            raise LoadError(
                f"'{self.pieces[0].name}' would have to be converted along dimension {dim}, across its rows"
            )

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if func in (torch.cat, torch.concat):
            return _cat(*args, **named)
        if func in (torch.chunk, torch.split):
            return getattr(args[0], func.__name__)(*args[1:], **named)
        raise LoadError(f"tensors would have to be converted by {func.__name__}, which whole rows cannot be")

    def entry(self, name: str) -> TensorEntry:
        """Where this tensor lies, under a name."""
        if len(self.pieces) == 1:
            return replace(self.pieces[0], name=name)
        nbytes = sum(piece.nbytes for piece in self.pieces)
        return replace(self.pieces[0], name=name, shape=tuple(self.shape), nbytes=nbytes, pieces=tuple(self.pieces))


def _cat(tensors: Sequence[Rows], dim: int = 0) -> Rows:
    first = tensors[0]
    first._check_first(dim)
    for one in tensors:
        if (one.pieces[0].dtype, one.shape[1:]) != (first.pieces[0].dtype, first.shape[1:]):
            raise LoadError(f"'{one.pieces[0].name}' and '{first.pieces[0].name}' differ in type or width; cannot join")
    return Rows([piece for one in tensors for piece in one.pieces])


def _rows_of(entry: TensorEntry, start: int, stop: int) -> TensorEntry:
    """Some rows of a tensor. A tensor of one dimension has single numbers for rows, or whole blocks of them."""
    total = entry.shape[0]
    low, high = entry.nbytes * start, entry.nbytes * stop
    if entry.block_type is not None and len(entry.shape) == 1:
        from qexp.quantizers.gguf_types import TYPES

        block = TYPES[entry.block_type].block
        if start % block or stop % block:
            raise LoadError(f"'{entry.name}' would have to be cut at {start} or {stop}, inside a block of {block}")
    return replace(
        entry,
        shape=(stop - start, *entry.shape[1:]),
        offset=entry.offset + low // max(total, 1),
        nbytes=(high - low) // max(total, 1),
    )
