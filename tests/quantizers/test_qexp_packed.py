"""The packed backend: which types there are, how many bits they take, and what it says to wrong settings."""

import pytest
import torch
from torch import nn

from qexp.errors import ConfigError
from qexp.offloading.payload import leaves, true_nbytes
from qexp.quantizers.base import load_quantizer
from qexp.quantizers.packed.elements import ELEMENTS
from qexp.quantizers.packed.tensor import PackedTensor
from qexp.quantizers.qexp_packed import PackedConfig, PackedQuantizer
from qexp.quantizers.rows import WeightSpec
from tests.backends import CPU, backend_config
from tests.quantizers.test_contract import gaussian


def pack(
    shape: tuple[int, int], dtype: torch.dtype = torch.float32, **fields: object
) -> tuple[PackedQuantizer, nn.Parameter]:
    quantizer = PackedQuantizer(PackedConfig(**fields))  # type: ignore[arg-type]
    return quantizer, quantizer.create_quantized_param(WeightSpec("x", shape, dtype), [gaussian(*shape)], {}, CPU)


def test_every_width_and_every_split_of_it_is_there() -> None:
    """Of 3 to 8 bits: one is the sign, at least one exponent; 2 + 3 + … + 7 ways. And int4wo beside uint4wo."""
    assert {f"uint{bits}wo" for bits in range(1, 9)} | {"int4wo"} == {name for name in ELEMENTS if "int" in name}
    floats = [name for name in ELEMENTS if name.startswith("fp")]
    assert len(floats) == 27
    for name in floats:
        bits, exponent, mantissa = int(name[2]), int(name[5]), int(name[7])
        assert bits == exponent + mantissa + 1
        assert (ELEMENTS[name].bits, ELEMENTS[name].exponent_bits, ELEMENTS[name].mantissa_bits) == (
            bits,
            exponent,
            mantissa,
        )


@pytest.mark.parametrize("group_size", [16, 32, 64, 128, None])
@pytest.mark.parametrize("quant_type", ELEMENTS)
def test_bits_are_really_stored(quant_type: str, group_size: int | None) -> None:
    quantizer, parameter = pack((3, 256), quant_type=quant_type, group_size=group_size)
    nbytes = sum(leaf.untyped_storage().nbytes() for leaf in leaves(parameter))
    assert nbytes == true_nbytes(parameter) == quantizer.quantized_nbytes(WeightSpec("x", (3, 256), torch.float32))
    bits = 8 * nbytes / (3 * 256)
    per_group = 16 if ELEMENTS[quant_type].is_float else 32
    assert bits == ELEMENTS[quant_type].bits + per_group / (group_size or 256)


@pytest.mark.parametrize(
    ("shape", "group_size"), [((1, 1), None), ((1, 1), 1), ((5, 7), 7), ((3, 100), 20), ((2, 33), 3)]
)
@pytest.mark.parametrize("quant_type", ["uint1wo", "uint3wo", "uint7wo", "fp5_e2w2"])
def test_odd_shapes_are_filled_up_to_eight_weights_a_row(
    quant_type: str, shape: tuple[int, int], group_size: int | None
) -> None:
    quantizer, parameter = pack(shape, quant_type=quant_type, group_size=group_size)
    assert true_nbytes(parameter) == quantizer.quantized_nbytes(WeightSpec("x", shape, torch.float32))
    assert {name: tuple(tensor.shape) for name, tensor in parameter.inner_tensors.items()} == quantizer.inner_shapes(
        shape
    )
    assert parameter.qdata.shape[1] == ELEMENTS[quant_type].bits * ((shape[1] + 7) // 8)
    x = gaussian(2, shape[1], seed=1)
    torch.testing.assert_close(nn.functional.linear(x, parameter), x @ parameter.dequantize().T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_int4wo_is_uint4wo_and_layers_stay_linear(dtype: torch.dtype) -> None:
    _, one = pack((16, 128), dtype, quant_type="int4wo")
    quantizer, other = pack((16, 128), dtype, quant_type="uint4wo")
    assert all(torch.equal(a, b) for a, b in zip(leaves(one), leaves(other), strict=True))
    module = nn.Linear(128, 16)
    assert not quantizer.is_quantized(module)
    module.weight = other
    assert quantizer.is_quantized(module) and type(module) is nn.Linear
    assert type(other) is PackedTensor and other.dtype == dtype and not other.requires_grad


def test_more_bits_and_smaller_groups_are_nearer() -> None:
    weight = gaussian(32, 256)

    def error(**fields: object) -> float:
        return float((pack((32, 256), **fields)[1].dequantize() - weight).norm())

    by_bits = [error(quant_type=f"uint{bits}wo") for bits in range(1, 9)]
    by_group = [error(quant_type="fp4_e2w1", group_size=size) for size in (None, 128, 64, 32, 16)]
    for errors in (by_bits, by_group):
        assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0]


def test_fields_are_checked() -> None:
    with pytest.raises(
        ConfigError, match=r"quant_type='uint9wo' is unknown \(did you mean .*; use fp3_e1w1, .*uint8wo"
    ):
        PackedConfig(quant_type="uint9wo")
    with pytest.raises(ConfigError, match=r"'fp6_e3w3' is unknown \(did you mean .*fp6_e3w2"):
        PackedConfig(quant_type="fp6_e3w3")
    with pytest.raises(ConfigError, match="group_size=0 must be 1 or more, or null"):
        backend_config("packed_uint4", "group_size=0")
    assert backend_config("packed_uint4", "quant_type=uint8wo").label == "uint8wo"


def test_a_group_that_does_not_divide_is_refused_with_those_that_do() -> None:
    quantizer = load_quantizer(backend_config("packed_uint4", "group_size=48"))
    with pytest.raises(
        ConfigError,
        match=r"group_size=48 does not divide in_features=128 of 'a\.b'; use 16, 32, 64 or 128, or null for",
    ):
        quantizer.reason_to_skip(WeightSpec("a.b", (64, 128), torch.float32))
    with pytest.raises(ConfigError, match=r"in_features=7 of 'a\.b'; use null for one scale a row, or add the layer"):
        quantizer.reason_to_skip(WeightSpec("a.b", (64, 7), torch.float32))
    for group_size, columns in [(48, 96), (None, 7)]:
        config = PackedConfig(group_size=group_size)
        assert load_quantizer(config).reason_to_skip(WeightSpec("a.b", (64, columns), torch.float32)) is None
