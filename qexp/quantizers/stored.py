"""What the tensors of a ready-quantized weight must be, compared with a checkpoint's headers before a byte is read.

Libraries put a weight together from whatever they are given, and what does not fit comes out as other numbers, or as a
crash of the process in a kernel that reads past its end. So every part is compared: its dtype and its shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qexp.errors import LoadError

if TYPE_CHECKING:
    from qexp.checkpoints.tensor_entry import TensorEntry
    from qexp.quantizers.rows import WeightSpec

FLOATS = ("F32", "F16", "BF16")
REMEDY = "the checkpoint is damaged, or another model's: download it again, or check its config.json"


@dataclass(frozen=True)
class Part:
    """A part of a stored weight. dtypes: safetensors' names; shapes: any of these; None where only the bytes tell."""

    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...] | None


def check_parts(spec: WeightSpec, parts: Mapping[str, TensorEntry], expected: Mapping[str, Part], kind: str) -> None:
    """Raises LoadError for a part of `spec`'s weight that is not what `kind` (for the message) has there."""
    for name, entry in parts.items():
        part = expected[name]
        if entry.dtype not in part.dtypes or (part.shapes is not None and entry.shape not in part.shapes):
            raise LoadError(
                f"{entry.name!r} is {entry.dtype} {list(entry.shape)} in '{entry.file}', which is not the {name} of "
                f"{list(spec.shape)} weights as {kind}; {REMEDY}"
            )


def lacks(what: str) -> LoadError:
    return LoadError(f"the checkpoint lacks {what}; download it again")
