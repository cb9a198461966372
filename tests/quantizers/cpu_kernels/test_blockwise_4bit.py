"""The 4-bit search on the CPU: the library's bytes, on values chosen to be hard."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qexp.quantizers.bitsandbytes_support.library import library


def _neighbours(values: Tensor) -> Tensor:
    """Each value with the next float32 below and above it."""
    below, above = (torch.nextafter(values, torch.tensor(limit)) for limit in (-torch.inf, torch.inf))
    return torch.stack([below, values, above], 1).flatten()


def _ties(scale: float) -> Tensor:
    """Blocks of 64 whose absmax is `scale` and whose other values lie on, and one bit beside, every midpoint."""
    from qexp.quantizers.cpu_kernels.blockwise_4bit import code_table

    code = library().functional.get_4bit_type("nf4", device="cpu")
    fp4 = library().functional.get_4bit_type("fp4", device="cpu")
    values = []
    for table in (code, fp4):
        near = _neighbours(torch.tensor(code_table(table).midpoints) * scale)
        values.append(torch.cat([torch.tensor([scale]), near, torch.full((63 - len(near),), -scale)]))
    return torch.cat(values)


def quantize_4bit(weight: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    from qexp.quantizers.cpu_kernels import blockwise_4bit
    from qexp.quantizers.cpu_kernels.blockwise_4bit import code_table

    table = code_table(library().functional.get_4bit_type(quant_type, device="cpu"))
    packed = torch.empty(weight.numel() // 2, dtype=torch.uint8)
    absmax = torch.empty(-(-weight.numel() // blocksize), dtype=torch.float32)
    blockwise_4bit.quantize_4bit(weight, table, blocksize, packed, absmax)
    return packed, absmax


def _gaussian(dtype: torch.dtype, count: int = 64 * 500 + 26) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(3)).to(dtype)


HARD: dict[str, Callable[[], Tensor]] = {
    "float32": lambda: _gaussian(torch.float32),
    "float16": lambda: _gaussian(torch.float16),
    "bfloat16": lambda: _gaussian(torch.bfloat16),
    "ties": lambda: torch.cat([_ties(scale) for scale in (1.0, 0.37, 3e-5, 1e20)]),
    "ties in bfloat16": lambda: torch.cat([_ties(scale) for scale in (1.0, 0.375)]).bfloat16(),
    "all bfloat16 values up to 1": lambda: torch.arange(0, 0x3F81, dtype=torch.int16)[1:].view(torch.bfloat16),
    "zeros": lambda: torch.zeros(64 * 3 + 2),
    "minus zeros": lambda: -torch.zeros(64 * 3 + 2),
    "a zero block between others": lambda: torch.cat([torch.ones(64), torch.zeros(64), _gaussian(torch.float32, 64)]),
    "denormals": lambda: torch.arange(-320, 320, dtype=torch.float32) * 1.4e-45,
    "denormals in float16": lambda: torch.arange(1, 641, dtype=torch.int16).view(torch.float16),
    "below the lowest absmax": lambda: torch.linspace(-1, 1, 640) * 3e-39,
    "largest": lambda: torch.tensor([torch.finfo(torch.float32).max, -torch.finfo(torch.float32).max] * 64),
    "largest in float16": lambda: torch.tensor([65504.0, -65504.0, 1.0, 0.0] * 32, dtype=torch.float16),
    "shorter than a block": lambda: _gaussian(torch.float32, 10),
}


@pytest.mark.parametrize("blocksize", [32, 64, 4096])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("name", HARD)
def test_the_bytes_are_the_librarys(name: str, quant_type: str, blocksize: int) -> None:
    functional, weight = library().functional, HARD[name]()
    packed, absmax = quantize_4bit(weight, quant_type, blocksize)
    expected, state = functional.quantize_4bit(weight, blocksize=blocksize, quant_type=quant_type)
    assert torch.equal(packed, expected.flatten())
    assert torch.equal(absmax.view(torch.int32), state.absmax.view(torch.int32))


def test_the_input_is_left_as_it_was() -> None:
    weight = _gaussian(torch.float32)
    before = weight.clone()
    quantize_4bit(weight, "nf4", 64)
    assert torch.equal(weight, before)


@pytest.mark.exhaustive
def test_comparisons_are_compiled_for_the_widest_vectors() -> None:
    from qexp.quantizers.cpu_kernels import kernels
    from qexp.quantizers.cpu_kernels.compiler import compile_module, describe_machine

    arrays = ("float32_1", "uint8_1", "uint16_1", "uint8_1", "float32_1")
    kinds = ("uint16_1", "int64", "int64", "float32_1", "uint8_1", "int64", *arrays)
    code = describe_machine().emit_assembly(compile_module(kernels.nearest_4bit.function, kinds))
    has_512_bits = "avx512f" in Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    assert ("zmm" in code) == has_512_bits
