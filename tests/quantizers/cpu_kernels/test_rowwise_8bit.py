"""8 bits a row on the CPU: the libraries' bytes, on values chosen to be hard."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qexp.quantizers.bitsandbytes_support.library import library as bitsandbytes
from qexp.quantizers.quanto_support.library import library as quanto
from qexp.quantizers.rows import clear_nan

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
COLUMNS = 128


def _gaussian(scale: float = 1.0, rows: int = 37) -> Tensor:
    return torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(3)) * scale


def _ties() -> Tensor:
    """Rows whose absmax is 127 (and 127.5) times a power of two, with every half-way point between two values."""
    steps = torch.arange(-64, 64).float() + 0.5
    rows = [torch.cat([torch.tensor([sign * top]), steps[1:]]) for top in (127.0, 127.5) for sign in (1, -1)]
    return torch.stack([row * 2.0**power for row in rows for power in (-10, 0, 3)])


def _tiny() -> Tensor:
    """Rows around the least and the largest scales whose reciprocal is used."""
    rows = _gaussian(rows=80)
    return rows * 2.0 ** torch.linspace(-130, -90, 80).round().unsqueeze(1)


def _edges() -> Tensor:
    """A row of zeros, of minus zeros, one number among zeros, rows of one value, the largest in fp16, denormals."""
    one = torch.zeros(COLUMNS)
    one[5] = -0.3
    rows = [torch.zeros(COLUMNS), -torch.zeros(COLUMNS), one, torch.full((COLUMNS,), 0.7)]
    rows += [torch.linspace(-65504, 65504, COLUMNS), torch.linspace(-1e-7, 1e-7, COLUMNS)]
    return torch.stack([*rows, torch.linspace(-6e-5, 3e-5, COLUMNS), torch.linspace(-1e-30, 1e-30, COLUMNS)])


HARD: dict[str, Callable[[], Tensor]] = {
    "gaussian": _gaussian,
    "many rows": lambda: _gaussian(rows=5000),  # of which some have a scale for which the order of roundings counts
    "small": lambda: _gaussian(1e-4),
    "large": lambda: _gaussian(1e4),
    "tiny": _tiny,
    "ties": _ties,
    "edges": _edges,
    "every bfloat16 up to 1": lambda: (
        torch.arange(0x3F80, dtype=torch.int16).view(torch.bfloat16).view(127, 128).float()
    ),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", HARD)
def test_llm_int8_is_bitsandbytes(name: str, dtype: torch.dtype) -> None:
    from qexp.quantizers.cpu_kernels import rowwise_8bit

    weight = HARD[name]().clamp(-65504, 65504).to(dtype)
    values = torch.empty(weight.shape, dtype=torch.int8)
    scale = rowwise_8bit.llm_int8(weight, values)
    expected, largest, _ = bitsandbytes().functional.int8_vectorwise_quant(weight.half())
    assert torch.equal(values, expected)
    assert torch.equal(scale, largest)


@pytest.mark.parametrize("group_size", [32, COLUMNS])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", HARD)
def test_int8_is_torchaos(name: str, dtype: torch.dtype, group_size: int) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, PerGroup, PerRow

    from qexp.quantizers.cpu_kernels import rowwise_8bit
    from qexp.quantizers.torchao_support.library import inner_tensors, quantize

    weight = HARD[name]().clamp(-65504, 65504).to(dtype)
    granularity = PerRow() if group_size == COLUMNS else PerGroup(group_size)
    config = Int8WeightOnlyConfig(granularity=granularity, set_inductor_config=False)
    expected = inner_tensors(quantize(weight.clone(), config))
    values = torch.empty(weight.shape, dtype=torch.int8)
    scale = rowwise_8bit.torchao_int8(weight, group_size, values)
    assert torch.equal(values, expected["qdata"])
    assert torch.equal(scale.flatten(), expected["scale"].flatten())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", HARD)
def test_int8_is_quantos(name: str, dtype: torch.dtype) -> None:
    from qexp.quantizers.cpu_kernels import rowwise_8bit

    weight = HARD[name]().clamp(-65504, 65504).to(dtype)
    qtype = quanto().qint8
    scale = quanto().AbsmaxOptimizer()(weight, qtype=qtype, axis=0)
    expected = torch.ops.quanto.quantize_symmetric(weight, dtype=qtype.dtype, axis=0, scale=scale)
    values = torch.empty(weight.shape, dtype=torch.int8)
    found = rowwise_8bit.quanto_int8(weight, values)
    assert torch.equal(found, scale)
    assert torch.equal(values, expected)


def test_products_with_the_reciprocal_round_to_bf16_as_quotients() -> None:
    """Every pair of significands: powers of two change nothing."""
    one = torch.arange(128, 256).float()
    quotients, products = one.unsqueeze(1) / one, one.unsqueeze(1) * (1 / one)
    assert not torch.equal(quotients, products)
    assert torch.equal(quotients.bfloat16(), products.bfloat16())


def test_rounding_to_fp16_is_pytorchs() -> None:
    """Every fp16 number, the middle between it and the next, and the float32 numbers beside both."""
    from qexp.quantizers.cpu_kernels import rowwise_8bit

    every = torch.arange(0x7C01, dtype=torch.int16).view(torch.float16).float()
    every[-1] = 65536  # where infinity is, in the order of fp16
    middles = (every[:-1] + every[1:]) / 2
    values = torch.cat([every, middles, torch.linspace(65504, 65536, 97), torch.tensor([1e30, torch.inf])])
    bits = values.view(torch.int32)
    values = torch.cat([bits - 1, bits, bits + 1]).clamp_(0, 0x7F800000).view(torch.float32)
    rows = torch.cat([values, -values]).unsqueeze(1)  # of one weight each, whose magnitude is the scale
    found = rowwise_8bit.llm_int8(rows, torch.empty(rows.shape, dtype=torch.int8))
    assert torch.equal(found, rows.abs().half().float().squeeze(1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_scale_of_what_is_not_finite_is_not_finite(dtype: torch.dtype) -> None:
    from qexp.quantizers.cpu_kernels import rowwise_8bit

    weight = torch.tensor([[1, -3, 2], [1, torch.nan, 2], [-torch.inf, 0, 1], [0, -0.0, 0]], dtype=dtype)
    weight[1, 1] = -weight[1, 1]  # NaN with its sign bit set
    values = torch.empty(weight.shape, dtype=torch.int8)
    scales = [rowwise_8bit.llm_int8(weight, values), rowwise_8bit.torchao_int8(weight, 3, values)]
    for found in [*scales, rowwise_8bit.quanto_int8(weight, values)]:
        assert (found.flatten().isfinite() == torch.tensor([True, False, False, True])).all()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_nan_is_cleared_among_every_byte_of_float8(dtype: torch.dtype) -> None:
    every = torch.arange(256).to(torch.uint8)
    values, expected = every.clone(), every.clone()
    expected[every.view(dtype).float().isnan()] = 0
    clear_nan(values.view(dtype))
    assert torch.equal(values, expected)
    assert not torch.equal(values, every)
    without = values.clone()
    clear_nan(without.view(dtype))
    assert torch.equal(without, values)
