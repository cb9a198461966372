"""Tensors without data that record which pieces of a checkpoint's files hold their values.

Most operations of a conversion (`cat`, `stack`, `chunk`, `split`, slices, reshapes) only rearrange pieces of a file,
which are read in order. Quantized blocks are rearranged in the same way and stay unchanged, since rows are whole
blocks. Other operations (a transposition, rows cut into many small pieces) are recorded as a function and applied after
reading; this works for plain numbers and any function that does not depend on values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from qexp.checkpoints.dtypes import NAMES, TORCH_DTYPES
from qexp.checkpoints.gguf_types import TYPES
from qexp.checkpoints.tensor_entry import DTYPE_BYTES, TensorEntry
from qexp.errors import LoadError

Transform = Callable[[Tensor], Tensor]  # all values of the pieces, [n] -> the tensor
MANY_PIECES, SMALL_PIECE_BYTES = 256, 16 << 10  # more pieces than this, each smaller: read as one, then sorted


class Lazy:
    """A tensor without data: the pieces of a file that hold its values, and the transform applied to them.

    pieces: all of one dtype; without a transform, the tensor's values in order. transform: see `Transform`.
    dtype_name: of the transform's result, if it differs from the pieces'.
    """

    def __init__(
        self,
        pieces: Sequence[TensorEntry],
        shape: Iterable[int],
        transform: Transform | None = None,
        dtype_name: str | None = None,
    ) -> None:
        self.pieces, self.shape, self.transform = list(pieces), torch.Size(shape), transform
        self.dtype_name = dtype_name or self.pieces[0].dtype

    @classmethod
    def of(cls, entry: TensorEntry) -> Lazy:
        pieces = entry.pieces or (replace(entry, transform=None),)
        return cls(pieces, entry.shape, entry.transform, entry.dtype)

    @property
    def name(self) -> str:
        return self.pieces[0].name

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self.dtype_name]

    def __len__(self) -> int:
        return self.shape[0]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not callable(getattr(Tensor, name, None)):
            raise AttributeError(name)
        return lambda *args, **named: _apply_function(getattr(Tensor, name), (self, *args), named)

    def __getitem__(self, index: Any) -> Any:
        return _apply_function(Tensor.__getitem__, (self, index), {})

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _apply_function(func, args, dict(kwargs or {}))

    def entry(self, name: str) -> TensorEntry:
        """Return the entry of this tensor under a new name."""
        if len(self.pieces) == 1 and self.transform is None:
            return replace(self.pieces[0], name=name, shape=tuple(self.shape))
        return replace(
            self.pieces[0],
            name=name,
            dtype=self.dtype_name,
            shape=tuple(self.shape),
            nbytes=sum(piece.nbytes for piece in self.pieces),
            pieces=tuple(self.pieces),
            transform=self.transform,
        )


def _apply_function(func: Any, args: Sequence[Any], named: dict[str, Any]) -> Any:
    """Apply a torch function to lazy tensors: by rearranging pieces if possible, else after reading."""
    by_pieces = BY_PIECES.get(func.__name__)
    result = by_pieces(*args, **named) if by_pieces is not None else None
    return _computed(func, args, named) if result is None else result


def _contiguous(tensor: Lazy, **_: Any) -> Lazy:
    return tensor


def _cut(tensor: Lazy, start: int, stop: int) -> list[TensorEntry]:
    """Return the pieces that hold values `start` to `stop` of the flattened tensor."""
    found, position = [], 0
    for piece in tensor.pieces:
        count = math.prod(piece.shape)
        low, high = max(start - position, 0), min(stop - position, count)
        if low < high:
            found.append(piece if (low, high) == (0, count) else _part(piece, low, high))
        position += count
    return found


def _part(piece: TensorEntry, low: int, high: int) -> TensorEntry:
    """Return values `low` to `high` of a piece as a 1-D entry; quantized pieces are cut between blocks only."""
    total = math.prod(piece.shape)
    if piece.block_type is not None:
        block = TYPES[piece.block_type].block
        if low % block or high % block:
            raise LoadError(f"'{piece.name}' would have to be cut at {low} or {high}, inside a block of {block}")
    first, last = piece.nbytes * low // total, piece.nbytes * high // total
    return replace(piece, shape=(high - low,), offset=piece.offset + first, nbytes=last - first)


def _narrow(tensor: Lazy, dim: int, start: int, length: int) -> Lazy | None:
    """Return `length` items of dimension `dim` from `start`, or None if they are not contiguous pieces."""
    if tensor.transform is not None:
        return None
    outer, inner = math.prod(tensor.shape[:dim]), math.prod(tensor.shape[dim + 1 :])
    if _is_crumbs(tensor, outer, length * inner):
        return None
    row = tensor.shape[dim] * inner
    pieces = [
        p for o in range(outer) for p in _cut(tensor, o * row + start * inner, o * row + (start + length) * inner)
    ]
    shape = (*tensor.shape[:dim], length, *tensor.shape[dim + 1 :])
    return Lazy(pieces or [_nothing(tensor)], shape)


def _nothing(tensor: Lazy) -> TensorEntry:
    return replace(tensor.pieces[0], shape=(0,), nbytes=0)


def _is_crumbs(tensor: Lazy, count: int, numbers: int) -> bool:
    """Return whether many small pieces are read faster as one. Never for quantized blocks, which are read in place."""
    piece = tensor.pieces[0]
    if piece.block_type is not None:
        return False
    return count > MANY_PIECES and numbers * DTYPE_BYTES[piece.dtype] < SMALL_PIECE_BYTES


def _getitem(tensor: Lazy, index: Any) -> Lazy | None:
    """Return a slice along the first dimension, or one of its items."""
    if isinstance(index, int):
        if not -len(tensor) <= index < len(tensor):
            raise IndexError(f"'{tensor.name}' has no row {index}")
        part = _getitem(tensor, slice(index, index + 1 or None))
        return None if part is None else Lazy(part.pieces, tensor.shape[1:])
    if not isinstance(index, slice) or index.step not in (None, 1) or not tensor.shape:
        return None
    start, stop, _ = index.indices(tensor.shape[0])
    return _narrow(tensor, 0, start, max(stop - start, 0))


def _split_lazy(tensor: Lazy, split_size: int | Iterable[int], dim: int = 0) -> tuple[Lazy, ...] | None:
    dim = dim % max(tensor.ndim, 1)
    total = tensor.shape[dim]
    if isinstance(split_size, int):
        lengths = [min(split_size, total - at) for at in range(0, total, split_size)]
    else:
        lengths = list(split_size)
    if sum(lengths) != total:
        raise ValueError(f"parts of {lengths} do not add up to the {total} of '{tensor.name}'")
    ends = [sum(lengths[: number + 1]) for number in range(len(lengths))]
    parts = [_narrow(tensor, dim, end - length, length) for end, length in zip(ends, lengths, strict=True)]
    return None if None in parts else tuple(part for part in parts if part is not None)


def _chunk(tensor: Lazy, chunks: int, dim: int = 0) -> tuple[Lazy, ...] | None:
    return _split_lazy(tensor, max(math.ceil(tensor.shape[dim] / chunks), 1), dim)


def _unbind(tensor: Lazy, dim: int = 0) -> tuple[Lazy, ...] | None:
    dim = dim % tensor.ndim
    parts = _split_lazy(tensor, 1, dim)
    return parts and tuple(Lazy(part.pieces, (*part.shape[:dim], *part.shape[dim + 1 :])) for part in parts)


def _cat(tensors: Sequence[Lazy], dim: int = 0) -> Lazy | None:
    first = tensors[0]
    dim = dim % max(first.ndim, 1)
    for one in tensors:
        kinds = {(each.dtype_name, each.pieces[0].dtype, each.ndim) for each in (one, first)}
        differs = [d for d, (a, b) in enumerate(zip(one.shape, first.shape, strict=False)) if a != b and d != dim]
        if len(kinds) > 1 or not first.ndim or differs:
            raise LoadError(f"'{one.name}' and '{first.name}' differ in type or shape; cannot join")
    outer, inner = math.prod(first.shape[:dim]), math.prod(first.shape[dim + 1 :])
    rows = [one.shape[dim] * inner for one in tensors]
    if any(one.transform is not None for one in tensors) or _is_crumbs(first, outer * len(tensors), min(rows)):
        return None
    pieces = [
        p
        for o in range(outer)
        for one, row in zip(tensors, rows, strict=True)
        for p in _cut(one, o * row, (o + 1) * row)
    ]
    shape = (*first.shape[:dim], sum(one.shape[dim] for one in tensors), *first.shape[dim + 1 :])
    return Lazy(pieces or [_nothing(first)], shape)


def _stack(tensors: Sequence[Lazy], dim: int = 0) -> Lazy | None:
    dim = dim % (tensors[0].ndim + 1)
    longer = [_unsqueeze(one, dim) for one in tensors]
    return None if None in longer else _cat([one for one in longer if one is not None], dim)


def _reshape(tensor: Lazy, *sizes: Any) -> Lazy | None:
    """Return the same values in another shape; the rows of quantized tensors must stay whole blocks."""
    shape = list(sizes[0] if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes)
    if -1 in shape:
        shape[shape.index(-1)] = tensor.numel() // max(-math.prod(shape), 1)
    if tensor.transform is not None or math.prod(shape) != tensor.numel():
        return None
    block = TYPES[kind].block if (kind := tensor.pieces[0].block_type) is not None else 1
    if shape and shape[-1] % block:
        raise LoadError(
            f"'{tensor.name}' cannot have rows of {shape[-1]}, which is not a multiple of its block {block}"
        )
    return Lazy(tensor.pieces, shape)


def _squeeze(tensor: Lazy, dim: int | None = None) -> Lazy | None:
    kept = [s for d, s in enumerate(tensor.shape) if s != 1 or (dim is not None and d != dim % tensor.ndim)]
    return _reshape(tensor, kept)


def _unsqueeze(tensor: Lazy, dim: int) -> Lazy | None:
    dim = dim % (tensor.ndim + 1)
    return _reshape(tensor, (*tensor.shape[:dim], 1, *tensor.shape[dim:]))


BY_PIECES: Mapping[str, Callable[..., Any]] = {
    "__getitem__": _getitem, "cat": _cat, "concat": _cat, "stack": _stack, "split": _split_lazy, "chunk": _chunk,
    "unbind": _unbind, "reshape": _reshape, "view": _reshape, "squeeze": _squeeze, "unsqueeze": _unsqueeze,
    "contiguous": _contiguous, "clone": _contiguous, "detach": _contiguous,
}  # fmt: skip


def _computed(func: Any, args: Sequence[Any], named: Mapping[str, Any]) -> Any:
    """Record `func` to be applied after reading; its result's shape is found on the meta device."""
    leaves, structure = tree_flatten((tuple(args), dict(named)), is_leaf=lambda leaf: isinstance(leaf, Lazy))
    inputs = [leaf for leaf in leaves if isinstance(leaf, Lazy)]
    if any(one.pieces[0].block_type is not None for one in inputs):
        raise LoadError(f"'{inputs[0].name}' is quantized in blocks and cannot be converted by `{func.__name__}`")
    if len({(one.dtype_name, one.pieces[0].dtype) for one in inputs}) > 1:
        raise LoadError(f"'{inputs[0].name}' and others differ in type; `{func.__name__}` cannot join them")

    def apply(tensors: Iterable[Tensor]) -> Any:
        rest = iter(tensors)
        filled, keywords = tree_unflatten([next(rest) if isinstance(one, Lazy) else one for one in leaves], structure)
        return func(*filled, **keywords)

    try:
        outcome = apply(torch.empty(one.shape, dtype=one.dtype, device="meta") for one in inputs)
    except (RuntimeError, NotImplementedError) as error:
        raise LoadError(f"'{inputs[0].name}' cannot be converted by `{func.__name__}`: {error}") from error
    if isinstance(outcome, Tensor):
        return _lazy_result(inputs, outcome, apply)
    if isinstance(outcome, tuple | list):
        chosen = [lambda tensors, number=number: apply(tensors)[number] for number in range(len(outcome))]
        return tuple(_lazy_result(inputs, one, choose) for one, choose in zip(outcome, chosen, strict=True))
    return outcome


def _lazy_result(inputs: Sequence[Lazy], outcome: Tensor, apply: Callable[[Iterable[Tensor]], Tensor]) -> Lazy:
    counts = [sum(math.prod(piece.shape) for piece in one.pieces) for one in inputs]

    def transform(numbers: Tensor) -> Tensor:
        parts = numbers.split(counts)
        return apply(_made(one, part) for one, part in zip(inputs, parts, strict=True))

    pieces = [piece for one in inputs for piece in one.pieces]
    return Lazy(pieces, outcome.shape, transform, NAMES.get(outcome.dtype))


def _made(tensor: Lazy, numbers: Tensor) -> Tensor:
    """Build a tensor from all values of its pieces, [n]."""
    return numbers.view(tensor.shape) if tensor.transform is None else tensor.transform(numbers)
