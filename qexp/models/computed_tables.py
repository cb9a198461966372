"""Large tables that a class computes while it is built, evaluated only where no file brings them.

    pos_embed = get_2d_sincos_pos_embed(1536, 192)        # SD3: 0.6 s, and 226 MiB that the checkpoint overwrites
    self.register_buffer("pos_embed", pos_embed, persistent=True)

Within `deferred_tables`, an operation with a result of `LARGE` numbers is not run. Its result is a `Table`: a tensor
with shape and dtype that keeps the operation and its arguments. What is computed from a table is a table as well. It is
evaluated, by the same operations in the same order, as soon as somebody looks at a number or writes into it; or, once
the network is built, by `settle_tables`, unless the checkpoint has a tensor of its name.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only
from typing_extensions import override

LARGE = 1 << 20  # numbers; what is smaller takes no time
# of results that depend on more than the arguments, or whose shape depends on numbers
NOT_PURE = ("nondeterministic_seeded", "data_dependent_output", "dynamic_output_shape")
LOOKS = {Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.data_ptr, Tensor.untyped_storage, Tensor.__deepcopy__}
MOVES = (torch.ops.aten.detach.default, torch.ops.aten._to_copy.default)  # of each parameter that is registered


class Table(Tensor):
    """A tensor on the CPU that is not computed yet."""

    meta: Tensor
    recipe: tuple[Any, Sequence[Any], Mapping[str, Any], torch.dtype] | None
    made: Tensor | None

    @staticmethod
    def __new__(cls, meta: Tensor, recipe: tuple[Any, Sequence[Any], Mapping[str, Any], torch.dtype]) -> Table:
        """Make one. meta: its shape, strides and dtype. recipe: operation, arguments, torch's default dtype then."""
        place: dict[str, Any] = {"strides": meta.stride(), "storage_offset": meta.storage_offset()}
        own: Any = Tensor._make_wrapper_subclass(cls, meta.shape, dtype=meta.dtype, device=torch.device("cpu"), **place)
        own.meta, own.recipe, own.made = meta, recipe, None
        return own

    def evaluate(self) -> Tensor:
        """Return the tensor, the same one in every call."""
        if self.made is None:
            assert self.recipe is not None
            function, arguments, options, dtype = self.recipe
            with (
                default_dtype(dtype),
                torch.no_grad(),
                _disable_current_modes(),
            ):  # it decides what whole numbers become
                self.made = function(*_evaluated(arguments), **_evaluated(options))
            self.recipe = None
        assert self.made is not None
        return self.made

    @classmethod
    @override
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in LOOKS:
            args = _evaluated(args)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    @override
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation after the network was built. `state_dict` detaches what it shows."""
        if func is torch.ops.aten.detach.default:
            return cls(args[0].meta, (func, args, {}, torch.get_default_dtype()))
        return func(*_evaluated(args), **_evaluated(kwargs or {}))


class _Deferring(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.tables: list[Table] = []

    @classmethod
    @override
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler for the first operation: two seconds

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        has_tables = Table in types
        if func in MOVES and not has_tables:
            return func(*args, **options)
        tensors = [leaf for leaf in tree_leaves((args, options)) if isinstance(leaf, Tensor)]
        if not tensors:  # a constructor: what it makes is often written into next
            return func(*args, **options)
        if func._schema.is_mutable:
            # a later operation must not see what is written now, nor an earlier one what was there before
            for table in self.tables if has_tables else ():
                table.evaluate()
        elif _is_pure(func) and (has_tables or _is_small(tensors)):
            made = self._defer(func, args, options, has_tables)
            if made is not None:
                return made
        return func(*_evaluated(args), **_evaluated(options))

    def _defer(self, func: Any, args: Any, options: Any, has_tables: bool) -> Tensor | None:
        """Return a table in place of the operation's result; None if it is to be run."""
        try:
            made = func(*_as_meta(args), **_as_meta({**options, **_META_DEVICE} if "device" in options else options))
        except (NotImplementedError, RuntimeError, TypeError):  # an operation without shapes of its own
            return None
        if not isinstance(made, Tensor) or not (has_tables or made.numel() >= LARGE):
            return None
        place = options.get("device")
        if place is not None and torch.device(place).type != "cpu":
            return made if torch.device(place).type == "meta" else None
        table = Table(made, (func, _copied(args), _copied(options), torch.get_default_dtype()))
        self.tables.append(table)
        return table


_META_DEVICE = {"device": torch.device("meta")}


def _is_pure(func: Any) -> bool:
    return not any(getattr(torch.Tag, name) in func.tags for name in NOT_PURE)


def _is_small(tensors: Sequence[Tensor]) -> bool:
    """Return whether these may be copied; a large tensor that is there already is computed with at once."""
    return all(not tensor.is_meta and tensor.numel() < LARGE for tensor in tensors)


def _evaluated(values: Any) -> Any:
    return tree_map_only(Table, Table.evaluate, values)


def _as_meta(values: Any) -> Any:
    return tree_map_only(Tensor, lambda one: one.meta if isinstance(one, Table) else one.to("meta"), values)


def _copied(values: Any) -> Any:
    """Copy arguments as they are now: who owns a tensor may write into it."""
    return tree_map_only(Tensor, lambda one: one if isinstance(one, Table) else one.detach().clone(), values)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make a dtype torch's default in the block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deferred_tables() -> Iterator[None]:
    """Make large results tables in the block. The caller gives the network to `settle_tables`."""
    with _Deferring():
        yield


def settle_tables(model: nn.Module, brought: Container[str]) -> None:
    """Give a network the numbers of its tables, but for buffers that are saved with it and that a file brings.

    brought: names of the checkpoint's tensors, the model's own. Such a buffer is on the meta device afterwards.
    """
    for path, module in model.named_modules(remove_duplicate=False):
        for name, buffer in module._buffers.items():
            if isinstance(buffer, Table):
                is_brought = f"{path}.{name}".removeprefix(".") in brought
                is_saved = name not in module._non_persistent_buffers_set
                module._buffers[name] = buffer.meta if is_brought and is_saved else buffer.evaluate()
        for name, value in vars(module).items():
            if isinstance(value, Table):
                vars(module)[name] = value.evaluate()
