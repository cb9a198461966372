"""NF4 and FP4 blockwise quantization on the CPU: the bytes of bitsandbytes, many times faster.

Each block of consecutive weights is scaled by its absmax to -1..1; each weight becomes the nearest of 16 code values,
two to a byte, the first in the high bits. The library searches the midpoints between the code values for each weight
on its own, and holds it as int32 and int64 on the way. Here a compiled loop counts the midpoints below each weight,
eight weights at a time. The arithmetic is the library's, operation by operation (bitsandbytes 0.50), so the bytes are
the same, which a test holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qexp.quantizers.cpu_kernels import kernels

ROOM_WEIGHTS = 1 << 11  # which stay in the first cache between the steps of the loop


@dataclass(frozen=True)
class CodeTable:
    """Code values as the search needs them: in rising order, with the index by which each is stored."""

    midpoints: Any  # float32 [15], rising
    indices: Any  # uint8 [16]
    is_rank: bool  # whether an index is the place of its value


def code_table(code: Tensor) -> CodeTable:
    """code: the 16 values [16] that stored indices stand for, float32."""
    order = torch.argsort(code)
    midpoints = (code[order[:-1]] + code[order[1:]]) / 2
    return CodeTable(midpoints.numpy(), order.to(torch.uint8).numpy(), bool((order == torch.arange(16)).all()))


def quantize_4bit(weight: Tensor, table: CodeTable, blocksize: int, packed: Tensor, absmax: Tensor) -> None:
    """Quantize n weights on the CPU, n even, into `packed`, uint8 [n / 2], and `absmax`, float32 [ceil(n / blocksize)].

    weight: float32, float16 or bfloat16, of any shape, contiguous. The absmax of a block that is not finite is not,
    either.
    """
    source, shift = kernels.source_bits(weight)
    room = blocksize * max(ROOM_WEIGHTS // blocksize, 1)
    scaled, codes = torch.empty(room).numpy(), torch.empty(room, dtype=torch.uint8).numpy()
    kernels.nearest_4bit(
        source.reshape(-1), shift, blocksize, table.midpoints, table.indices, int(table.is_rank), scaled, codes,
        codes.view(np.uint16), packed.numpy(), absmax.numpy(),
    )  # fmt: skip
