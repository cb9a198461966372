"""Decide from the source of `forward` whether a subclass of `nn.Linear` computes exactly x Wᵀ + b.

    def forward(self, input):                # transformers' FalconLinear
        hidden_states = input @ self.weight.T
        if self.bias is None:
            return hidden_states
        return hidden_states + self.bias

The body is executed symbolically, once with a bias and once without: the product, the sum, names bound to them, and
branches on `self.bias` are followed; anything else makes it a different layer. Names of modules (`F`, `torch`) are
resolved in the function's globals.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import nn

INPUT, WEIGHT, TURNED, BIAS, PRODUCT, RESULT, NOTHING = "x", "W", "Wᵀ", "b", "x Wᵀ", "x Wᵀ + b", "None"
LINEAR = (torch.nn.functional.linear,)
MATMUL = (torch.matmul, torch.mm)
ADD = (torch.add,)
TRANSPOSITIONS = {("t", frozenset()), ("transpose", frozenset({"0", "1"})), ("transpose", frozenset({"-1", "-2"}))}


@cache
def is_linear_forward(kind: type[nn.Linear]) -> bool:
    """Return whether the class's `forward` is equivalent to that of `nn.Linear`."""
    if kind.forward is nn.Linear.forward:
        return True
    own = kind.__mro__[: kind.__mro__.index(nn.Linear)]
    if any({"weight", "bias", "__call__", "_call_impl", "__getattr__"} & vars(one).keys() for one in own):
        return False
    try:
        (function,) = ast.parse(textwrap.dedent(inspect.getsource(kind.forward))).body
    except (OSError, TypeError, SyntaxError, ValueError):  # made at run time
        return False
    return isinstance(function, ast.FunctionDef) and _computes_linear(function, kind.forward.__globals__)


def _computes_linear(function: ast.FunctionDef, names: dict[str, Any]) -> bool:
    arguments = function.args
    more = [*arguments.posonlyargs, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    if function.decorator_list or len(arguments.args) != 2 or any(more):
        return False
    own, given = (argument.arg for argument in arguments.args)
    return all(
        _Run(own, {given: INPUT}, names, has_bias).block(function.body) == (RESULT if has_bias else PRODUCT)
        for has_bias in (True, False)
    )


class _Run:
    """One symbolic execution; a value of None is anything unknown."""

    def __init__(self, own: str, values: dict[str, str | None], names: dict[str, Any], has_bias: bool) -> None:
        self.own, self.values, self.names, self.has_bias = own, values, names, has_bias

    def block(self, statements: Sequence[ast.stmt]) -> str | None:
        """Return the symbol that the block returns; "" if it has no return."""
        for statement in statements:
            if isinstance(statement, ast.Return):
                return self.value(statement.value)
            if isinstance(statement, ast.If):
                found = self.branch(statement)
                if found != "":
                    return found
            elif isinstance(statement, ast.Assign) and isinstance(target := statement.targets[0], ast.Name):
                if len(statement.targets) > 1:
                    return None
                self.values[target.id] = self.value(statement.value)
            elif isinstance(statement, ast.AugAssign) and isinstance(statement.target, ast.Name):
                sum_ = ast.BinOp(ast.Name(statement.target.id), statement.op, statement.value)
                self.values[statement.target.id] = self.value(sum_)
            elif not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)):  # a docstring
                return None
        return ""

    def branch(self, statement: ast.If) -> str | None:
        test = statement.test
        if not (isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], ast.Is | ast.IsNot)):
            return None
        if self.value(test.comparators[0]) != NOTHING or ast.unparse(test.left) != f"{self.own}.bias":
            return None
        holds = self.has_bias == isinstance(test.ops[0], ast.IsNot)
        return self.block(statement.body if holds else statement.orelse)

    def value(self, node: ast.expr | None) -> str | None:
        if isinstance(node, ast.Name):
            return self.values.get(node.id)
        if isinstance(node, ast.Constant):
            return NOTHING if node.value is None else None
        if isinstance(node, ast.Attribute):
            return self.attribute(node)
        if isinstance(node, ast.BinOp):
            operation = {ast.MatMult: _product, ast.Add: _add_terms}.get(type(node.op))
            return operation(self.value(node.left), self.value(node.right)) if operation else None
        return self.call(node) if isinstance(node, ast.Call) else None

    def attribute(self, node: ast.Attribute) -> str | None:
        if isinstance(node.value, ast.Name) and node.value.id == self.own:
            return {"weight": WEIGHT, "bias": BIAS if self.has_bias else NOTHING}.get(node.attr)
        return TURNED if node.attr in ("T", "mT") and self.value(node.value) == WEIGHT else None

    def call(self, node: ast.Call) -> str | None:
        named = {keyword.arg: self.value(keyword.value) for keyword in node.keywords}
        values = [self.value(argument) for argument in node.args]
        function = self.resolve(node.func)
        if function in LINEAR and named.keys() <= {"bias"} and values[:2] == [INPUT, WEIGHT]:
            return _add_terms(PRODUCT, [*values[2:], named.get("bias", NOTHING)][0])
        if named:
            return None
        if function in MATMUL and len(values) == 2:
            return _product(values[0], values[1])
        if function in ADD and len(values) == 2:
            return _add_terms(values[0], values[1])
        if isinstance(node.func, ast.Attribute) and self.value(node.func.value) == WEIGHT:
            dims = frozenset(ast.unparse(argument) for argument in node.args)
            return TURNED if (node.func.attr, dims) in TRANSPOSITIONS else None
        return None

    def resolve(self, node: ast.expr) -> Any:
        """Resolve a dotted name to a function, in the globals of the class's module."""
        if isinstance(node, ast.Name):
            return None if node.id in self.values else self.names.get(node.id)
        return getattr(self.resolve(node.value), node.attr, None) if isinstance(node, ast.Attribute) else None


def _product(left: str | None, right: str | None) -> str | None:
    return PRODUCT if (left, right) == (INPUT, TURNED) else None


def _add_terms(left: str | None, right: str | None) -> str | None:
    if {left, right} == {PRODUCT, BIAS}:
        return RESULT
    return PRODUCT if (left, right) == (PRODUCT, NOTHING) else None
