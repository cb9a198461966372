"""The number formats of packed weights."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Element:
    """A code: an unsigned integer, or a float of a sign, exponent_bits and the remaining bits as mantissa."""

    bits: int
    exponent_bits: int = 0

    @property
    def is_float(self) -> bool:
        return self.exponent_bits > 0

    @property
    def mantissa_bits(self) -> int:
        return self.bits - 1 - self.exponent_bits


ELEMENTS = {
    **{f"uint{bits}wo": Element(bits) for bits in range(1, 9)},
    "int4wo": Element(4),
    **{f"fp{bits}_e{e}w{bits - 1 - e}": Element(bits, e) for bits in range(3, 9) for e in range(1, bits)},
}
