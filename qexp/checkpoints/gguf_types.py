"""The tensor types of GGUF files: their numbers in a file, weights per block and bytes per block.

Each row of a weight is divided into blocks of consecutive weights; a block holds scales and packed values. The row
length must be a multiple of the block. Types with one weight per block are plain numbers, named as in safetensors
files.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and ggml-common.h
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class GGMLType:
    """number: in files; block: weights packed together into `block_bytes` bytes."""

    name: str
    number: int
    block: int
    block_bytes: int

    def nbytes(self, shape: Sequence[int]) -> int:
        """Return the bytes of a tensor; the last dimension of `shape` must be a multiple of the block."""
        return math.prod(shape) // self.block * self.block_bytes


# 2 bytes of an fp16 scale, sometimes 2 of a minimum; then scales of sub-blocks, high bits, low bits
_BLOCKED = {
    "Q4_0": (2, 32, 2 + 16),
    "Q4_1": (3, 32, 2 + 2 + 16),
    "Q5_0": (6, 32, 2 + 4 + 16),
    "Q5_1": (7, 32, 2 + 2 + 4 + 16),
    "Q8_0": (8, 32, 2 + 32),
    "Q8_1": (9, 32, 4 + 4 + 32),
    "Q2_K": (10, 256, 16 + 64 + 2 + 2),
    "Q3_K": (11, 256, 32 + 64 + 12 + 2),
    "Q4_K": (12, 256, 2 + 2 + 12 + 128),
    "Q5_K": (13, 256, 2 + 2 + 12 + 32 + 128),
    "Q6_K": (14, 256, 128 + 64 + 16 + 2),
    "Q8_K": (15, 256, 4 + 256 + 32),
    "IQ2_XXS": (16, 256, 2 + 64),
    "IQ2_XS": (17, 256, 2 + 64 + 8),
    "IQ3_XXS": (18, 256, 2 + 64 + 32),
    "IQ1_S": (19, 256, 2 + 32 + 16),
    "IQ4_NL": (20, 32, 2 + 16),
    "IQ3_S": (21, 256, 2 + 64 + 8 + 32 + 4),
    "IQ2_S": (22, 256, 2 + 32 + 32 + 8 + 8),
    "IQ4_XS": (23, 256, 2 + 2 + 4 + 128),
    "IQ1_M": (29, 256, 32 + 16 + 8),
    "TQ1_0": (34, 256, 48 + 4 + 2),
    "TQ2_0": (35, 256, 64 + 2),
    "MXFP4": (39, 32, 1 + 16),
    "NVFP4": (40, 64, 4 + 32),
    "Q1_0": (41, 128, 2 + 16),
}
_PLAIN = {
    "F32": (0, 4), "F16": (1, 2), "I8": (24, 1), "I16": (25, 2), "I32": (26, 4), "I64": (27, 8), "F64": (28, 8),
    "BF16": (30, 2),
}  # fmt: skip

TYPES = {name: GGMLType(name, number, block, nbytes) for name, (number, block, nbytes) in _BLOCKED.items()}
TYPES |= {name: GGMLType(name, number, 1, nbytes) for name, (number, nbytes) in _PLAIN.items()}
BLOCKED_PREFIX = "GGUF_"  # before the names of blocked types where they are the dtype of a checkpoint's tensor
BY_NUMBER = {kind.number: kind for kind in TYPES.values()}

ENCODABLE = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "MXFP4", "TQ2_0", "TQ1_0")  # what weights can be made into
DECODABLE = tuple(name for name in _BLOCKED if name not in ("Q8_1", "Q8_K", "Q1_0"))  # as gguf-py, which lacks these
