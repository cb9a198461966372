"""The inputs of `task=forward`: read from a file, and checked against the network before its weights are read.

Whole numbers and truth values stay as they are; floating-point numbers are cast to the dtype the model computes in.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qexp.errors import ConfigError, choices, did_you_mean
from qexp.tasks.input_files import open_array, read_lines

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from qexp.tasks.input_files import ForwardConfig


def read_inputs(task: ForwardConfig, source: Any, skeleton: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a file by the names of the network's arguments, on the CPU, as they are stored.

    skeleton: the network without weights, whose forward says which arguments there are.
    Raises: ConfigError for one that it does not take, or needs and does not get, and for values that are not finite.
    """
    import torch

    if task.is_text:
        inputs: dict[str, Tensor] = source.forward_inputs(skeleton, read_lines(task))
    elif task.path.suffix.lower() == ".npy":
        import numpy as np

        array = np.array(open_array(task))
        inputs = {_first_argument(skeleton): torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))}
    else:
        from safetensors.torch import load_file

        inputs = load_file(task.path)
    _check_names(task, inputs, skeleton)
    for name, tensor in inputs.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            raise ConfigError(
                f"task.inputs={task.inputs}: {name!r} has values that are not finite; every output would be; mend them"
            )
    return inputs


def in_dtype(inputs: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return inputs with floating-point numbers in the dtype that the model computes in."""
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}


def _named_arguments(skeleton: nn.Module) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [name for name, item in inspect.signature(skeleton.forward).parameters.items() if item.kind in kinds]


def _first_argument(skeleton: nn.Module) -> str:
    names = _named_arguments(skeleton)
    if not names:
        raise ConfigError(
            f"forward of {type(skeleton).__name__} names no argument to give a .npy file to; use .safetensors"
        )
    return names[0]


def _check_names(task: ForwardConfig, inputs: Mapping[str, Tensor], skeleton: nn.Module) -> None:
    parameters, kind = inspect.signature(skeleton.forward).parameters, type(skeleton).__name__
    named = _named_arguments(skeleton)
    further = next((_further_names(item) for item in parameters.values() if item.kind is item.VAR_KEYWORD), ())
    for name in inputs:
        if further is not None and name not in (*named, *further):
            raise ConfigError(
                f"task.inputs={task.inputs}: forward of {kind} takes no {name!r}{did_you_mean(name, named)}; "
                f"its arguments are {choices(named)}"
            )
    lacking = [name for name in named if parameters[name].default is inspect.Parameter.empty and name not in inputs]
    if lacking:
        raise ConfigError(
            f"task.inputs={task.inputs}: forward of {kind} needs {choices(lacking)} besides {choices(inputs)}; give "
            "every argument as a tensor of a .safetensors file"
        )


def _further_names(keywords: inspect.Parameter) -> tuple[str, ...] | None:
    """Return the names that `**kwargs` takes by its annotation, a typed dict; None if it may be any."""
    unpacked = typing.get_args(keywords.annotation)
    names = getattr(unpacked[0], "__annotations__", None) if unpacked else None
    return None if names is None else tuple(names)
