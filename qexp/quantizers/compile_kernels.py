"""Compile every loop for this processor, so that no load has to: `python -m qexp.quantizers.compile_kernels`.

scripts/setup calls it. See `cpu_kernels/loops.py` for where the machine code is kept.
"""

from __future__ import annotations

import time

import torch

from qexp.checkpoints.gguf_types import TYPES
from qexp.quantizers.cpu_kernels import blockwise_4bit, rowwise_8bit
from qexp.quantizers.gguf_blocks import kernels as gguf
from qexp.quantizers.packed import kernels as packed

ROWS, COLUMNS = 4, 512  # whole blocks of every format


def compile_all() -> None:
    """Call each loop with small tensors of the dtypes that it takes."""
    for dtype in (torch.bfloat16, torch.float32):
        weight = torch.linspace(-1, 1, ROWS * COLUMNS).view(ROWS, COLUMNS).to(dtype)
        values = torch.empty(weight.shape, dtype=torch.int8)
        rowwise_8bit.llm_int8(weight, values)
        rowwise_8bit.torchao_int8(weight, COLUMNS, values)
        rowwise_8bit.quanto_int8(weight, values)
        table = blockwise_4bit.code_table(torch.linspace(-1, 1, 16))
        bytes_, absmax = torch.empty(weight.numel() // 2, dtype=torch.uint8), torch.empty(weight.numel() // 64)
        blockwise_4bit.quantize_4bit(weight, table, 64, bytes_, absmax)
        packed.encode_integers(weight, 4, 128, (0.9,))
        packed.encode_floats(weight, 4, 1, 128, (0.9,))
        for name in gguf.ENCODED:
            gguf.encode(name, weight)
        for name in gguf.DECODED:
            blocks = torch.zeros(ROWS, TYPES[name].block_bytes, dtype=torch.uint8)
            gguf.decode(name, blocks, torch.empty(ROWS, TYPES[name].block, dtype=dtype))


if __name__ == "__main__":
    started = time.perf_counter()
    compile_all()
    print(f"loops for quantizing on this processor are compiled ({time.perf_counter() - started:.1f} s)")
