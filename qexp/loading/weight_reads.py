"""Which layers' weights a network reads outside of the layers' own calls, found in its source code.

    hidden = hidden.to(self.wo.weight.dtype)     T5's feed-forward, timestep embedders, vision towers
    dt = self.dt_proj.weight @ step              Mamba's mixer, on the way to its fused kernel

Quantized, such a weight may be packed bytes: the network would cast activations to bytes, or multiply by them. What is
read is told apart, since most formats answer for dtype and shape as the dense weight would. A read counts if it is of a
layer that the code names from `self`: `self.a.b[0].weight`, a local name for that, or a loop over `self.layers`.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import CodeType

from torch import nn

NOT_RUN = re.compile(r"_*(re)?(init|set|tie|fuse|unfuse|resize|load|save|prune|extra_repr|post_init|repr|from)(_|$)")
SHAPES = ("shape", "size", "numel", "nelement", "ndim", "dim", "stride", "nbytes", "itemsize")
HARMLESS = ("device", "requires_grad", "requires_grad_", "grad", "is_meta", "is_cuda", "layout", "data_ptr")
ANY = "*"  # of a path: every child


@dataclass(frozen=True)
class WeightRead:
    """what: dtype, shape or value; path: from the reading module to the layer; reader: the module's class."""

    what: str
    path: tuple[str, ...]
    reader: str


def weight_reads(model: nn.Module) -> dict[str, list[WeightRead]]:
    """Layer -> how its weight is read by modules that hold it."""
    found: dict[str, list[WeightRead]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for read in _reads_of(type(module)):  # type: ignore[arg-type]
            for layer in _under(name, module, read.path):
                found.setdefault(layer, []).append(read)
    return found


def reason_not_to_pack(reads: Iterable[WeightRead], hidden: Collection[str]) -> str | None:
    """Why a layer whose weight is read so cannot hold a packed one; None if it can.

    hidden: what the packed weight does not answer as the dense one.
    """
    for read in reads:
        if read.what == "value":
            return f"{read.reader} computes with its weight itself"
        if read.what in hidden:
            return f"{read.reader} asks for the {read.what} of its weight, which a packed one does not have"
    return None


def keep_to_layers(model: nn.Module, names: Collection[str]) -> None:
    """Have torch's own transformer call the layers of these names, in place of a kernel that takes their weights."""
    for path, module in model.named_modules():
        below = f"{path}." if path else ""
        if isinstance(module, nn.TransformerEncoderLayer) and {f"{below}linear1", f"{below}linear2"} & {*names}:
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder) and any(name.startswith(below) for name in names):
            module.use_nested_tensor = False


def _under(name: str, module: nn.Module, path: Iterable[str]) -> list[str]:
    """Return the names of the modules that a path leads to."""
    reached = [(name, module)]
    for part in path:
        children = [(above, dict(parent.named_children())) for above, parent in reached]
        reached = [
            (f"{above}.{child}" if above else child, below)
            for above, named in children
            for child, below in named.items()
            if part in (ANY, child)
        ]
    return [reached_name for reached_name, _ in reached]


@cache
def _reads_of(kind: type[nn.Module]) -> tuple[WeightRead, ...]:
    """Return the reads in the methods of a class and of those it inherits from, but for torch's own."""
    reads: list[WeightRead] = []
    seen: set[str] = set()
    for one in kind.__mro__:
        if one.__module__.partition(".")[0] == "torch" or not issubclass(one, nn.Module):
            continue
        for method in _methods(one) if _names_a_weight(one) else ():
            if method.name not in seen and not NOT_RUN.match(method.name):
                reads += [WeightRead(what, path, kind.__name__) for what, path in _reads_in(method)]
        seen.update(vars(one))  # what a class overrides is not run
    return tuple(dict.fromkeys(reads))


def _names_a_weight(kind: type) -> bool:
    """Return whether a method that runs may have an attribute `weight` in its code: few have, and to parse a file takes
    long.

    True, too, for what is not the code that stands in the class: another decorator's than one of functools.wraps.
    """
    for name, value in vars(kind).items():
        if NOT_RUN.match(name):
            continue
        function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        wrapped = inspect.unwrap(function) if callable(function) else None  # or the method itself wraps another one
        codes = [code for one in (function, wrapped) if (code := getattr(one, "__code__", None)) is not None]
        if not codes:
            if hasattr(value, "__get__") and not isinstance(value, type) and name not in ("__dict__", "__weakref__"):
                return True  # a cached property
            continue
        own = [code for code in codes if code.co_qualname == f"{kind.__qualname__}.{name}"]
        if not own or "weight" in _names_in(own[0]):
            return True
    return False


def _names_in(code: CodeType) -> set[str]:
    inner = [_names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return {*code.co_names}.union(*inner)


def _methods(kind: type) -> list[ast.FunctionDef]:
    try:
        classes = _classes_in(inspect.getsourcefile(kind) or "")
    except (OSError, TypeError, SyntaxError, ValueError):  # made at run time
        return []
    body = classes[kind.__qualname__].body if kind.__qualname__ in classes else []
    return [node for node in body if isinstance(node, ast.FunctionDef)]


@cache
def _classes_in(file: str) -> dict[str, ast.ClassDef]:
    """Return the classes in a file, by their qualified names."""
    found: dict[str, ast.ClassDef] = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                found[prefix + child.name] = child
                visit(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.FunctionDef):
                visit(child, f"{prefix}{child.name}.<locals>.")
            elif not isinstance(child, ast.expr):
                visit(child, prefix)

    visit(ast.parse(Path(file).read_text(encoding="utf-8")), "")
    return found


def _reads_in(method: ast.FunctionDef) -> Iterator[tuple[str, tuple[str, ...]]]:
    own = method.args.args[0].arg if method.args.args else ""
    names: dict[str, tuple[str, ...]] = {own: ()}
    above = {child: node for node in ast.walk(method) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(method):  # an alias comes before its use in all but pathological code
        name, value, rest = _binding(node)
        if name is not None and (path := _path(value, names)) is not None:
            names[name] = (*path, *rest)
    for node in ast.walk(method):
        if isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.ctx, ast.Load):
            path = _path(node.value, names)
            what = _kind_of_use(node, above)
            if path and what is not None:
                yield what, path


def _binding(node: ast.AST) -> tuple[str | None, ast.AST, tuple[str, ...]]:
    """(the name that a statement binds, to what, and what of it): an assignment, or a loop over children."""
    if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
        return node.targets[0].id, node.value, ()
    if isinstance(node, ast.For | ast.comprehension):
        target, values = node.target, node.iter
        is_counted = isinstance(values, ast.Call) and getattr(values.func, "id", None) == "enumerate" and values.args
        if is_counted and isinstance(target, ast.Tuple):
            target, values = target.elts[-1], values.args[0]  # type: ignore[attr-defined]
        if isinstance(target, ast.Name):
            return target.id, values, (ANY,)
    return None, node, ()


def _path(node: ast.AST, names: dict[str, tuple[str, ...]]) -> tuple[str, ...] | None:
    """Return the names from the module on that an expression follows; None if it does not begin there."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if not isinstance(node, ast.Attribute | ast.Subscript) or (before := _path(node.value, names)) is None:
        return None
    if isinstance(node, ast.Attribute):
        return (*before, node.attr)
    index = getattr(node.slice, "value", None)  # of a constant
    return (*before, str(index) if isinstance(index, int | str) else ANY)


def _kind_of_use(node: ast.Attribute, above: dict[ast.AST, ast.AST]) -> str | None:
    """Name the use that code makes of a weight; None for attributes that every tensor has alike."""
    parent = above.get(node)
    if isinstance(parent, ast.Attribute):
        if parent.attr in HARMLESS:
            return None
        return "dtype" if parent.attr == "dtype" else "shape" if parent.attr in SHAPES else "value"
    if isinstance(parent, ast.Compare) and all(isinstance(op, ast.Is | ast.IsNot) for op in parent.ops):
        return None
    is_asked_of = isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name)
    if is_asked_of and parent.func.id in ("isinstance", "hasattr", "type", "id"):  # type: ignore[union-attr]
        return None
    return "value"
