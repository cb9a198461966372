"""Check the tensors of an already quantized weight against a checkpoint's headers, before a byte is read.

Libraries assemble a weight from any tensors. Tensors that do not fit give wrong values, or crash the process in a
kernel that reads past their end. So the dtype and shape of every part are compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qexp.checkpoints.tensor_entry import TensorEntry
from qexp.errors import LoadError
from qexp.quantizers.rows import WeightSpec

FLOATS = ("F32", "F16", "BF16")
REMEDY = "the checkpoint is damaged, or belongs to another model: download it again, or check its config.json"


@dataclass(frozen=True)
class Part:
    """A part of a stored weight. dtypes: safetensors' names. shapes: the valid ones, or None if only bytes count."""

    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...] | None


def check_parts(spec: WeightSpec, parts: Mapping[str, TensorEntry], expected: Mapping[str, Part], kind: str) -> None:
    """Raise LoadError for a part of a weight with a wrong dtype or shape. kind: the format, for the message."""
    for name, entry in parts.items():
        part = expected[name]
        if entry.dtype not in part.dtypes or (part.shapes is not None and entry.shape not in part.shapes):
            raise LoadError(
                f"{entry.name!r} is {entry.dtype} {list(entry.shape)} in '{entry.file}', which is not the {name} of "
                f"{list(spec.shape)} weights as {kind}; {REMEDY}"
            )


def lacks(what: str) -> LoadError:
    return LoadError(f"the checkpoint lacks {what}; download it again")
