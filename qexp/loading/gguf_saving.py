"""Tensors of a model, quantized in GGUF blocks or plain, as a GGUF file that gguf-py and diffusers open."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qexp.checkpoints.dtypes import TORCH_DTYPES
from qexp.checkpoints.gguf_types import TYPES
from qexp.checkpoints.safetensors_file import ALIGNMENT
from qexp.errors import ConfigError
from qexp.quantizers.gguf_blocks.tensor import GGUFTensor
from qexp.system.files import replacing

KINDS = {dtype: name for name, dtype in TORCH_DTYPES.items() if name in TYPES}
STORED_AS = {torch.bfloat16: torch.float32, torch.bool: torch.int8, torch.uint8: torch.int16}  # of plain tensors


def save_gguf(
    path: Path, tensors: Mapping[str, Tensor], *, architecture: str, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors (a state dict) to a file with gguf's GGUFWriter, one tensor in memory at a time.

    Plain bf16 is stored as fp32, exactly: of plain types diffusers computes with fp32 and fp16 alone. bool and uint8,
    which GGUF has not, become int8 and int16.
    Raises: ConfigError for a tensor that GGUF has no type for; DiskError for a disk that is full or not writable.
    """
    kinds = {name: _find_type(name, tensor) for name, tensor in tensors.items()}
    with replacing(path) as beside:
        writer = _make_writer(beside, tensors, kinds, architecture, metadata or {})
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            (file,) = writer.fout
            writer.write_padding(file, file.tell())
            for tensor in tensors.values():
                # not writer.write_tensor_data: numpy's tofile, which it calls, drops the errno of a full disk
                writer.write_padding(file, file.write(_as_stored(tensor).numpy().data))
        finally:
            writer.close()


def _make_writer(
    path: Path, tensors: Mapping[str, Tensor], kinds: Mapping[str, str], architecture: str, metadata: Mapping[str, str]
) -> Any:
    """Return the library's writer with everything that the header holds, and no bytes of tensors."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    writer.add_custom_alignment(ALIGNMENT)  # of dense tensors, which can then be mapped
    if any(TYPES[kind].block > 1 for kind in kinds.values()):
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, text in metadata.items():
        writer.add_key_value(key, text, gguf.GGUFValueType.STRING)  # add_string leaves empty texts out
    for name, tensor in tensors.items():
        nbytes = TYPES[kinds[name]].nbytes(tensor.shape)
        writer.add_tensor_info(name, tensor.shape, None, nbytes, gguf.GGMLQuantizationType[kinds[name]])
    return writer


def _find_type(name: str, tensor: Tensor) -> str:
    if isinstance(tensor, GGUFTensor):
        return tensor.quant_type
    dtype = STORED_AS.get(tensor.dtype, tensor.dtype)
    if type(tensor) not in (Tensor, torch.nn.Parameter) or dtype not in KINDS:
        raise ConfigError(
            f"'{name}' is a {type(tensor).__name__} of {tensor.dtype}, which GGUF cannot hold; save it as safetensors"
        )
    return KINDS[dtype]


def _as_stored(tensor: Tensor) -> Tensor:
    """Return the bytes that a file holds for a tensor, as a contiguous one in CPU memory."""
    if isinstance(tensor, GGUFTensor):
        return tensor.raw.cpu().contiguous()
    return tensor.detach().to("cpu", STORED_AS.get(tensor.dtype, tensor.dtype)).contiguous()
