"""Tensors of a model, quantized in GGUF blocks or plain, as a GGUF file that gguf-py and diffusers open."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qexp.checkpoints.dtypes import TORCH_DTYPES
from qexp.checkpoints.gguf_types import TYPES
from qexp.checkpoints.gguf_writer import GGUFTensorInfo, write_gguf
from qexp.errors import ConfigError
from qexp.quantizers.gguf_blocks.tensor import GGUFTensor

KINDS = {dtype: name for name, dtype in TORCH_DTYPES.items() if name in TYPES}
STORED_AS = {torch.bfloat16: torch.float32, torch.bool: torch.int8, torch.uint8: torch.int16}  # of plain tensors


def save_gguf(
    path: Path, tensors: Mapping[str, Tensor], *, architecture: str, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write tensors (a state dict) to a file, one at a time.

    Plain bf16 is stored as fp32, exactly: of plain types diffusers computes with fp32 and fp16 alone. bool and uint8,
    which GGUF has not, become int8 and int16.
    Raises: ConfigError for a tensor that GGUF has no type for; DiskError for a disk that is full or not writable.
    """
    infos = [GGUFTensorInfo(name, _kind(name, tensor), tuple(tensor.shape)) for name, tensor in tensors.items()]
    write_gguf(path, infos, lambda info: _bytes(tensors[info.name]), architecture=architecture, metadata=metadata)


def _kind(name: str, tensor: Tensor) -> str:
    if isinstance(tensor, GGUFTensor):
        return tensor.quant_type
    dtype = STORED_AS.get(tensor.dtype, tensor.dtype)
    if type(tensor) not in (Tensor, torch.nn.Parameter) or dtype not in KINDS:
        raise ConfigError(
            f"'{name}' is a {type(tensor).__name__} of {tensor.dtype}, which GGUF cannot hold; save it as safetensors"
        )
    return KINDS[dtype]


def _bytes(tensor: Tensor) -> Any:
    if isinstance(tensor, GGUFTensor):
        return tensor.raw.cpu().contiguous().numpy()
    stored = tensor.detach().to("cpu", STORED_AS.get(tensor.dtype, tensor.dtype))
    return stored.contiguous().numpy()
