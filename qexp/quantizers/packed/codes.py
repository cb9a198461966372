"""A group of weights as small integers and the numbers that turn them back: two number formats, the same two steps.

Integers (`uintNwo`): w ~ offset + scale * q, q = 0 .. 2^N - 1, with offset and scale in bf16 for each group. The offset
is rounded down and the scale up, so that min to max lies inside what the codes reach: no weight is further off than
scale / 2, also where all weights of a group lie far from zero. (Where the codes would reach beyond the weight's dtype
the scale is rounded down instead: no weight comes back as infinity.) With 4 bits or fewer it is better to cut the
largest weights off than to spread the codes over them: parts of the range are tried as well (SHRINK), and the least
squared error wins, group by group.

Floats (`fpX_eAwB`): w ~ scale * v, with a scale in bf16 for each group. v has a sign bit, A bits of exponent and B of
mantissa, and subnormals below the lowest exponent; no codes are spent on infinity and NaN, as in FP6-LLM
(arXiv:2401.14112) and in the OCP Microscaling elements E2M1, E2M3 and E3M2. The exponent is biased so that the largest
value is 2 - 2^-B: the published values times a power of two, by which the scale is divided. A group's absmax becomes
the largest value (with 4 bits or fewer, parts of it are tried too). The nearest value is taken, ties to even.

A weight comes back in fp32, computed as above, and is rounded once, to the dtype asked for.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from qexp.quantizers.packed.bits import pack, unpack
from qexp.quantizers.packed.elements import ELEMENTS, Element
from qexp.system.imports import once

# bits -> the parts of the range of a group that are tried beside the whole
SHRINK = {1: (0.6, 0.5, 0.4, 0.3, 0.2), 2: (0.85, 0.75, 0.65, 0.5), 3: (0.9, 0.8, 0.7), 4: (0.95, 0.9, 0.85)}
FLOAT32_MAX = torch.finfo(torch.float32).max

Parameters = dict[str, Tensor]  # "scale" and, for integers, "offset": fp32 [rows, groups, 1], each exact in bf16


class IntegerCodes:
    """A number format. Weights and their values are fp32 [rows, groups, size], codes uint8 of the same shape."""

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.levels = 2**bits - 1

    def parameters(self, weight: Tensor, shrink: float, limit: float) -> Parameters:
        """Return the parameters that map `shrink` of each group's range onto the codes, within -limit and limit."""
        low, high = weight.amin(dim=2, keepdim=True), weight.amax(dim=2, keepdim=True)
        middle, half = low / 2 + high / 2, (high / 2 - low / 2) * shrink
        if shrink < 1:
            low, high = middle - half, middle + half
        offset = bf16_below(low).clamp(min=-bf16_below(torch.full_like(low[:1, :1], limit)))
        scale = -bf16_below(offset / self.levels - high / self.levels).clamp(max=0)
        highest = (limit / self.levels - offset / self.levels).clamp(max=FLOAT32_MAX / self.levels)
        return {"scale": torch.minimum(scale, bf16_below(highest)), "offset": offset}

    def codes(self, weight: Tensor, parameters: Parameters) -> Tensor:
        """Return the codes of the nearest values."""
        steps = (weight - parameters["offset"]) / or_one(parameters["scale"])
        return steps.round_().clamp_(0, self.levels).to(torch.uint8)

    def values(self, codes: Tensor, parameters: Parameters) -> Tensor:
        """Return the values of the codes."""
        return codes.float().mul_(parameters["scale"]).add_(parameters["offset"])


class FloatCodes:
    """A number format with the methods of `IntegerCodes`."""

    def __init__(self, exponent_bits: int, mantissa_bits: int) -> None:
        self.bits = 1 + exponent_bits + mantissa_bits
        self.mantissa_bits = mantissa_bits
        self.lowest = 2 - 2**exponent_bits  # exponent of the lowest normal values, and of all below
        self.largest = 2 - 2.0**-mantissa_bits

    def parameters(self, weight: Tensor, shrink: float, limit: float) -> Parameters:
        scale = (weight.abs().amax(dim=2, keepdim=True) * (shrink / self.largest)).bfloat16().float()
        return {"scale": torch.minimum(scale, bf16_below(torch.full_like(scale[:1, :1], limit / self.largest)))}

    def codes(self, weight: Tensor, parameters: Parameters) -> Tensor:
        values = (weight / or_one(parameters["scale"])).clamp_(-self.largest, self.largest)
        magnitude = values.abs()
        biased = (magnitude.view(torch.int32) >> 23).clamp_(min=self.lowest + 127)  # fp32's own exponent field
        # Adding the power of two whose last bit is worth one step rounds to steps, ties to even, and counts the steps.
        rounder = (biased + (23 - self.mantissa_bits)) << 23
        steps = magnitude.add_(rounder.view(torch.float32)).view(torch.int32) - rounder
        # As steps are counted from zero, 2^B of them reach the next exponent: the carry needs no case of its own.
        codes = ((biased - (self.lowest + 127)) << self.mantissa_bits).add_(steps)
        return codes.add_((values < 0).int() << (self.bits - 1)).to(torch.uint8)

    def values(self, codes: Tensor, parameters: Parameters) -> Tensor:
        table = float_table(self.bits, self.mantissa_bits, codes.device)
        return table.index_select(0, codes.reshape(-1).int()).view(codes.shape).mul_(parameters["scale"])


Codes = IntegerCodes | FloatCodes


@once
def float_table(bits: int, mantissa_bits: int, device: torch.device) -> Tensor:
    """Return the value of every code, fp32 [2^bits]: sign in the highest bit, then exponent, then mantissa."""
    lowest = 2 - 2 ** (bits - 1 - mantissa_bits)
    magnitude = torch.arange(2 ** (bits - 1), dtype=torch.float64)
    exponent, mantissa = torch.floor(magnitude / 2**mantissa_bits), magnitude % 2**mantissa_bits
    significand = mantissa / 2**mantissa_bits + (exponent > 0)
    positive = significand * torch.exp2(exponent.clamp(min=1) - 1 + lowest)
    return torch.cat([positive, -positive]).float().to(device)


@cache
def codes_of(quant_type: str) -> Codes:
    element = ELEMENTS[quant_type]
    return FloatCodes(element.exponent_bits, element.mantissa_bits) if element.is_float else IntegerCodes(element.bits)


def encode(weight: Tensor, quant_type: str, groups: int) -> dict[str, Tensor]:
    """Quantize rows: a weight [rows, in], of finite values, to its packed codes and parameters.

    Returns: qdata uint8 [rows, N ceil(in / 8)], scale bf16 [rows, groups] and, for integers, an offset like it.
    """
    if weight.device.type == "cpu":
        return _encode_by_loops(weight, ELEMENTS[quant_type], groups)
    return encode_by_tensors(weight, quant_type, groups)


def encode_by_tensors(weight: Tensor, quant_type: str, groups: int) -> dict[str, Tensor]:
    """Encode as `encode` does, on any device."""
    codes, grouped = codes_of(quant_type), weight.float().view(weight.shape[0], groups, -1)
    best = _best_parameters(codes, grouped, torch.finfo(weight.dtype).max)
    packed = pack(codes.codes(grouped, best).view(weight.shape), codes.bits)
    return {"qdata": packed, **{name: value.squeeze(2).bfloat16() for name, value in best.items()}}


def _encode_by_loops(weight: Tensor, element: Element, groups: int) -> dict[str, Tensor]:
    from qexp.quantizers.packed import kernels

    (rows, columns), shrinks = weight.shape, SHRINK.get(element.bits, ())
    if element.is_float:
        found = kernels.encode_floats(weight, element.bits, element.mantissa_bits, columns // groups, shrinks)
    else:
        found = kernels.encode_integers(weight, element.bits, columns // groups, shrinks)
    codes, *parameters = found
    named = zip(("scale", "offset"), parameters, strict=False)
    return {"qdata": pack(codes, element.bits), **{name: value.view(rows, groups).bfloat16() for name, value in named}}


def _best_parameters(codes: Codes, weight: Tensor, limit: float) -> Parameters:
    best, least = codes.parameters(weight, 1.0, limit), None
    for shrink in SHRINK.get(codes.bits, ()):
        if least is None:
            least = _squared_error(codes, weight, best)
        candidate = codes.parameters(weight, shrink, limit)
        error = _squared_error(codes, weight, candidate)
        best = {name: torch.where(error < least, candidate[name], best[name]) for name in best}
        least = torch.minimum(error, least)
    return best


def _squared_error(codes: Codes, weight: Tensor, parameters: Parameters) -> Tensor:
    restored = codes.values(codes.codes(weight, parameters), parameters)
    return restored.sub_(weight).square_().sum(dim=2, keepdim=True)  # [rows, groups, 1]


def decode(inner: dict[str, Tensor], quant_type: str, columns: int) -> Tensor:
    """Decode rows of `encode` to fp32 [rows, in]."""
    codes, (rows, groups) = codes_of(quant_type), inner["scale"].shape
    parameters = {name: value.float().unsqueeze(2) for name, value in inner.items() if name != "qdata"}
    grouped = unpack(inner["qdata"], codes.bits, columns).reshape(rows, groups, -1)
    return codes.values(grouped, parameters).view(rows, columns)


def bf16_below(values: Tensor) -> Tensor:
    """Round fp32 values down to bf16, returned as fp32."""
    bits = values.view(torch.int32)  # bf16 is the upper half, and to cut the lower half off rounds towards zero
    return (torch.where(values < 0, bits + 0xFFFF, bits) & -0x10000).view(torch.float32)


def or_one(scale: Tensor) -> Tensor:
    """Return a divisor: the scale, or 1 where it underflows to 0 in bf16."""
    return torch.where(scale > 0, scale, 1.0)
