"""What a pipeline's `__call__` does, read in its source before anything is loaded: what it checks and returns.

`check_inputs` gets arguments of the call as they were given, or what the call has made of them by then: asked with
anything else it refuses tasks that the pipeline itself accepts.
"""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any

SAMPLES = ("images", "frames")  # fields of outputs


def checked_arguments(pipeline: Any, given: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the arguments that the call will pass to `check_inputs`; None if they are known only when it runs.

    given: the call's arguments; known: its parameters.
    """
    function = _call_of(type(pipeline))  # type: ignore[arg-type]
    asked = next(_calls_of(function, "self.check_inputs"), None) if function is not None else None
    parameters = list(inspect.signature(pipeline.check_inputs).parameters)
    if function is None or asked is None:
        defaults = {name: parameter.default for name, parameter in known.items()}
        return {name: given.get(name, defaults.get(name)) for name in parameters}
    passed = dict(zip(parameters, asked.args, strict=False)) | {str(one.arg): one.value for one in asked.keywords}
    computed = {
        node.id
        for node in ast.walk(function)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.lineno < asked.lineno
    }
    values = {}
    for name, node in passed.items():
        if isinstance(node, ast.Constant):
            values[name] = node.value
        elif isinstance(node, ast.Name) and given.get(node.id) is not None:
            values[name] = given[node.id]
        elif isinstance(node, ast.Name) and node.id in known and node.id not in computed:
            values[name] = known[node.id].default
        else:
            return None
    return values


def returned_fields(pipeline: Any) -> set[str] | None:
    """Return the fields of what the call returns; None if its source does not tell."""
    function = _call_of(type(pipeline))  # type: ignore[arg-type]
    if function is None:
        return None
    names = inspect.unwrap(type(pipeline).__call__).__globals__
    found: set[str] = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Return) and isinstance(node.value, ast.Call):
            kind = names.get(ast.unparse(node.value.func))
            if not is_dataclass(kind):
                return None
            found |= {field.name for field in fields(kind)}
    return found or None


def steps_of_call(scheduler: Any, steps: int, is_told_each: bool) -> int:
    """Return how often a pipeline reports a step: PNDM takes one more than asked for, Heun each but the last twice.

    is_told_each: False for pipelines of old, which report a step of several evaluations once.
    """
    if not hasattr(scheduler, "set_timesteps"):
        return steps
    own = copy.deepcopy(scheduler)
    try:
        own.set_timesteps(steps)
    except (ValueError, TypeError, AttributeError, RuntimeError):  # it needs a shift that the pipeline computes
        return steps
    count, order = len(own.timesteps), getattr(own, "order", 1)
    if is_told_each:
        return count
    warmup = count - steps * order
    return sum(i == count or (i > warmup and i % order == 0) for i in range(1, count + 1))


@cache
def _call_of(kind: type) -> ast.FunctionDef | None:
    try:
        (function,) = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(kind.__call__)))).body
    except (OSError, TypeError, SyntaxError, ValueError):  # made at run time
        return None
    return function if isinstance(function, ast.FunctionDef) else None


def _calls_of(function: ast.FunctionDef, name: str) -> Iterator[ast.Call]:
    return (node for node in ast.walk(function) if isinstance(node, ast.Call) and ast.unparse(node.func) == name)
