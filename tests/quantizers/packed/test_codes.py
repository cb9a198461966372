"""Number formats: values against torch's own float8 and the published elements, codes against torchao's, and bounds."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qexp.quantizers.packed.codes import SHRINK, bf16_below, decode, encode, encode_by_tensors, float_table
from qexp.quantizers.packed.elements import ELEMENTS, Element
from tests.backends import CPU
from tests.products import diagonal
from tests.quantizers.formulas import packed_floats, packed_integers
from tests.quantizers.test_contract import gaussian

FLOATS = {name: element for name, element in ELEMENTS.items() if element.is_float}
INTEGERS = {name: element for name, element in ELEMENTS.items() if not element.is_float}
EXTREMES = [
    sign * size for size in (0.0, 1.0, 1.2e-38, 1e-45, 6e-8, 65504.0, 3.3895314e38, 3.4028235e38) for sign in (1, -1)
]


def restored(weight: Tensor, quant_type: str, groups: int = 1) -> Tensor:
    return decode(encode(weight, quant_type, groups), quant_type, weight.shape[1])


def table(element: Element) -> Tensor:
    return float_table(element.bits, element.mantissa_bits, CPU)


OCP = {
    "fp4_e2w1": [0, 0.5, 1, 1.5, 2, 3, 4, 6],
    "fp6_e2w3": [*np.arange(0, 2, 1 / 8), *np.arange(2, 4, 1 / 4), *np.arange(4, 8, 1 / 2)],
    "fp6_e3w2": [*np.arange(0, 0.5, 1 / 16), *(2.0**e * (1 + m / 4) for e in range(-1, 5) for m in range(4))],
    "fp3_e2w0": [0, 1, 2, 4],
    "fp3_e1w1": [0, 1, 2, 3],
}


@pytest.mark.parametrize(("quant_type", "positive"), OCP.items())
def test_elements_are_the_published_ones_up_to_a_power_of_two(quant_type: str, positive: list[float]) -> None:
    """Source: OCP Microscaling Formats (MX) 1.0, section 5.3; those of three bits by hand."""
    values = table(FLOATS[quant_type])
    half = len(values) // 2
    assert torch.equal(values[half:], -values[:half])
    factor = positive[-1] / values[half - 1].item()
    assert np.log2(factor) % 1 == 0
    assert (values[:half] * factor).tolist() == positive


@pytest.mark.parametrize(
    ("quant_type", "dtype", "finite"),
    [("fp8_e4w3", torch.float8_e4m3fn, 127), ("fp8_e5w2", torch.float8_e5m2, 124)],
)
def test_eight_bits_are_torchs_float8_where_that_is_finite(quant_type: str, dtype: torch.dtype, finite: int) -> None:
    theirs = torch.arange(finite, dtype=torch.uint8).view(dtype).float()
    mine = table(FLOATS[quant_type])[:finite]
    assert torch.equal(theirs / theirs[-1], mine / mine[-1])


@pytest.mark.parametrize("quant_type", FLOATS)
def test_every_float_is_its_own_nearest(quant_type: str) -> None:
    """All codes at once, zero with its sign apart; also with 4 bits or fewer, as no other range is exact."""
    values = table(FLOATS[quant_type]).view(1, -1)
    for scale in (1.0, 0.0078125, 1.5 * 2.0**40):
        assert torch.equal(restored(values * scale, quant_type), values * scale)


@pytest.mark.parametrize("quant_type", FLOATS)
def test_floats_have_torchaos_codes(quant_type: str) -> None:
    """Its primitives outlived its packed tensors. They take one scale a row, and another bias."""
    from torchao.quantization.quant_primitives import _quantize_affine_floatx

    element, weight = FLOATS[quant_type], gaussian(40, 512)
    inner = encode(weight, quant_type, 1)
    bias = 2**element.exponent_bits - 1 - (2 ** (element.exponent_bits - 1) - 1)
    theirs = _quantize_affine_floatx(
        weight, inner["scale"].float() * 2.0**-bias, element.exponent_bits, element.mantissa_bits
    )
    values = table(element)[theirs.long()] * inner["scale"].float()
    assert torch.equal(decode(inner, quant_type, 512), values)


@pytest.mark.parametrize("group", [32, 64, 512])
@pytest.mark.parametrize("quant_type", ELEMENTS)
def test_errors_are_those_of_the_formula(quant_type: str, group: int) -> None:
    element, weight = ELEMENTS[quant_type], gaussian(64, 512)
    shrink = SHRINK.get(element.bits, ())
    if element.is_float:
        expected = packed_floats(weight.numpy(), element.exponent_bits, element.mantissa_bits, shrink, group)
    else:
        expected = packed_integers(weight.numpy(), element.bits, shrink, group)
    mine = restored(weight, quant_type, 512 // group).numpy()
    error, formula = (np.square(weight.numpy() - one).sum() for one in (mine, expected))
    assert 10 * np.log10(formula / error) == pytest.approx(0, abs=0.02)
    assert np.isclose(mine, expected, rtol=1e-5, atol=1e-6).mean() > 0.999  # all but where two are equally near


@pytest.mark.parametrize(
    ("quant_type", "dtype"), diagonal(ELEMENTS, [torch.float32, torch.bfloat16, torch.float16]), ids=str
)
def test_loops_compute_what_tensors_do(quant_type: str, dtype: torch.dtype) -> None:
    """Of several ranges that are equally good another one may be taken: its error is the same to the last bits."""
    top = torch.finfo(dtype).max
    ties = (torch.arange(-512, 512) / 16).view(2, 512)  # with a range of whole numbers, halfway between codes
    special = torch.tensor(EXTREMES).clamp(-top, top).repeat(2, 40)[:, :512]
    same, ramp = torch.full((1, 512), 0.1), torch.linspace(1e-3, 1, 512).view(1, 512)
    for weight in (gaussian(40, 512), gaussian(8, 512) * 1e-6, ties, special, same, same * -top, ramp, ramp - 5):
        weight = weight.to(dtype)
        for groups in (1, 16):
            loops, tensors = (make(weight, quant_type, groups) for make in (encode, encode_by_tensors))
            assert loops.keys() == tensors.keys()
            if all(torch.equal(loops[name], tensors[name]) for name in loops):
                continue
            errors = [
                (decode(one, quant_type, 512) - weight.float()).double().square().view(-1, 512 // groups).sum(1)
                for one in (loops, tensors)
            ]
            torch.testing.assert_close(*errors, rtol=1e-6, atol=0)
            assert (loops["scale"] != tensors["scale"]).float().mean() < 0.01


@pytest.mark.parametrize("bits", SHRINK)
def test_a_closer_range_pays_with_few_bits(bits: int) -> None:
    """Decibels that it gains on Gaussian weights, groups of 64: enough to be worth trying, or it would not be there."""
    weight = gaussian(64, 4096).numpy()
    whole, best = packed_integers(weight, bits, ()), packed_integers(weight, bits, SHRINK[bits])
    gain = 10 * np.log10(np.square(weight - whole).sum() / np.square(weight - best).sum())
    assert gain > {1: 8, 2: 2, 3: 0.8, 4: 0.3}[bits]


@st.composite
def weights(draw: st.DrawFn, reach: float = 1.0) -> Tensor:
    """Rows of any finite fp32, bf16 or fp16 numbers: of one size, of all sizes, far from zero, equal, or extreme."""
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    largest = reach * torch.finfo(dtype).max
    rows, columns = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 5, 8, 24, 64, 100]))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = generator.standard_normal((rows, columns)) * 10.0 ** draw(st.integers(-44, 38))
    if draw(st.booleans()):
        values *= 10.0 ** generator.integers(-10, 10, values.shape)
    if draw(st.booleans()):
        values = values * draw(st.sampled_from([0.0, 1e-6, 0.1])) + draw(st.sampled_from([0.0, 1.0, -1.2345678, 1e30]))
    for position, value in draw(
        st.dictionaries(st.integers(0, columns - 1), st.sampled_from(EXTREMES), max_size=4)
    ).items():
        values[:, position] = value
    return torch.from_numpy(np.clip(values, -largest, largest)).to(dtype).clamp(-largest, largest)


TYPES = st.sampled_from(sorted(ELEMENTS))


@settings(derandomize=True, deadline=None, max_examples=150)
@given(weights(), TYPES)
def test_whatever_is_finite_stays_finite_in_its_dtype(weight: Tensor, quant_type: str) -> None:
    inner = encode(weight, quant_type, 1)
    assert all(
        tensor.isfinite().all() and tensor.dtype == torch.bfloat16 for name, tensor in inner.items() if name != "qdata"
    )
    assert (inner["scale"] >= 0).all()
    back = decode(inner, quant_type, weight.shape[1]).to(weight.dtype)
    assert back.isfinite().all()
    zeros = (weight == 0).all(dim=1)
    assert (back[zeros] == 0).all()


@settings(derandomize=True, deadline=None, max_examples=80)
@given(weights(), TYPES, st.integers(1, 7))
def test_groups_know_nothing_of_each_other(weight: Tensor, quant_type: str, groups: int) -> None:
    """Whatever lies beside them, in the row or in other rows."""
    size = weight.shape[1]
    wide = torch.cat([weight.roll(shift, dims=0) for shift in range(groups)], dim=1)  # [rows, groups * size]
    together = restored(wide, quant_type, groups).view(len(weight), groups, size)
    alone = restored(wide.view(-1, size), quant_type).view(len(weight), groups, size)
    assert torch.equal(together, alone)
    inner = encode(wide, quant_type, groups)
    assert inner["qdata"].shape == (len(weight), ELEMENTS[quant_type].bits * -(-wide.shape[1] // 8))
    assert all(value.shape == (len(weight), groups) for name, value in inner.items() if name != "qdata")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("quant_type", ELEMENTS)
def test_the_largest_and_the_least_numbers_stay_finite(quant_type: str, dtype: torch.dtype) -> None:
    finfo = torch.finfo(dtype)
    numbers = [finfo.max, -finfo.max, finfo.tiny, -finfo.tiny, finfo.tiny * finfo.eps, 0.0]
    weight = torch.cartesian_prod(torch.tensor(numbers), torch.tensor(numbers)).to(dtype)
    inner = encode(weight, quant_type, 1)
    assert (inner["scale"] >= 0).all() and inner["scale"].isfinite().all()
    back = decode(inner, quant_type, 2).to(dtype)
    assert back.isfinite().all()
    apart = (weight[:, :1] - weight[:, 1:]).abs().double()  # inf, where no step can reach from one to the other
    assert ((back.double() - weight.double()).abs() <= torch.maximum(apart, weight.abs().double() * 0.01 + 1e-40)).all()


@settings(derandomize=True, deadline=None, max_examples=80)
@given(weights(reach=0.3), st.sampled_from(sorted(INTEGERS)))
def test_integers_are_within_half_a_step(weight: Tensor, quant_type: str) -> None:
    """With more than 4 bits. With fewer the range may be cut, but only if that makes the squared error smaller."""
    inner = encode(weight, quant_type, 1)
    dense = weight.double()
    error = (decode(inner, quant_type, weight.shape[1]).double() - dense).abs()
    rounding = dense.abs().amax(dim=1, keepdim=True) * 2**-20 + 1e-43  # of fp32
    if ELEMENTS[quant_type].bits > 4:
        assert (error <= inner["scale"].double() * 0.5 + rounding).all()
    else:
        spread = dense.amax(dim=1, keepdim=True) - dense.amin(dim=1, keepdim=True)
        step = (spread + dense.abs().amax(dim=1, keepdim=True) * 2**-7) / (2 ** ELEMENTS[quant_type].bits - 1)
        step = step * 1.01 + 1e-40  # as bf16, whose least number is 9e-41
        most = (step * 0.5 + rounding).square() * dense.shape[1]
        assert (error.square().sum(dim=1, keepdim=True) <= most).all()


@settings(derandomize=True, deadline=None, max_examples=120)
@given(weights(), st.sampled_from(sorted(FLOATS)))
def test_floats_are_the_nearest_of_all_that_the_scale_allows(weight: Tensor, quant_type: str) -> None:
    inner = encode(weight, quant_type, 1)
    scale = inner["scale"].double()
    mine = decode(inner, quant_type, weight.shape[1]).double()
    reach = table(FLOATS[quant_type]).double() * scale  # [rows, codes]
    nearest = (weight.double().unsqueeze(2) - reach.unsqueeze(1)).abs().amin(dim=2)
    rounding = weight.double().abs() * 2**-22 + 1e-45
    assert ((mine - weight.double()).abs() <= nearest + rounding).all()


def test_weights_far_from_zero_keep_their_differences() -> None:
    """Of a group around 100, whose offset in bf16 is up to a half off, the differences of 0.1 are what is left."""
    weight = 100 + gaussian(8, 64) / 10
    error = (restored(weight, "uint8wo") - weight).abs().max()
    assert error < 0.5 * (0.5 + 0.8) / 255 * 1.1


def test_equal_weights_that_bf16_holds_are_exact() -> None:
    weight = torch.tensor([[0.75], [-3.0], [0.0], [2.0**-120]]).expand(4, 16).contiguous()
    for quant_type in INTEGERS:
        assert torch.equal(restored(weight, quant_type), weight)


def test_bf16_below_is_the_next_number_down() -> None:
    values = torch.cat([gaussian(1000) * 10.0 ** torch.randint(-38, 38, (1000,)), torch.tensor(EXTREMES)])
    below = bf16_below(values)
    assert torch.equal(below.bfloat16().float(), below)
    assert (below <= values).all()
    above = torch.nextafter(below.bfloat16(), torch.tensor(torch.inf, dtype=torch.bfloat16)).float()
    assert (above > values).all()
