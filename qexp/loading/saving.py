"""Tensors to disk, whole or not at all."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from qexp.sweep.store import replacing


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file. Raises DiskError for a disk that is full or not writable."""
    with replacing(path) as beside:
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, beside, {"format": "pt"})
        except SafetensorError as error:  # what the library makes of an OSError, too
            code = re.search(r"\(os error (\d+)\)", str(error))
            if code is None:
                raise
            raise OSError(int(code[1]), os.strerror(int(code[1]))) from error
