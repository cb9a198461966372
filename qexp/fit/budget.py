"""From what is asked for to the limits of the program: bytes of the groups, and bytes that travel in a step."""

from __future__ import annotations

from dataclasses import dataclass, field

from qexp.errors import ConfigError
from qexp.fit.layers import ModelLayers
from qexp.fit.mix import Key
from qexp.fit.program import Groups, Limits, smallest_bytes
from qexp.fit.request import Request
from qexp.offloading.dispatch import PADDING_BYTES
from qexp.results.numbers import format_memory
from qexp.system.memory import GIB

SLOTS = 2  # layers that travel which are on the device at a time: one runs, the next one comes


@dataclass(frozen=True)
class Size:
    """Bytes of a model in parts: fixed, of all that no format is chosen for; numel: weights of the groups; beside:
    what loading or running takes besides; extra: see `Mix.travelling`."""

    fixed: int
    numel: int
    beside: int
    extra: dict[Key, int] = field(default_factory=dict)

    def bits(self, nbytes: int) -> float:
        """Return the bits per weight of groups that take `nbytes` bytes."""
        return 8 * nbytes / max(self.numel, 1)

    def bytes_at(self, bits: float) -> int:
        """Return the bytes that groups of so many bits a weight may take."""
        return int(bits * self.numel / 8)


def size_of(model: ModelLayers, groups: Groups, request: Request) -> Size:
    """Measure the groups by the plan."""
    dense = numel = 0
    extra: dict[Key, int] = {}
    for group in groups:
        component, layers = group[0].component, group[0].layers
        own = model.components[component]
        dense += own.dense_bytes(layers)
        numel += own.numel_of(layers)
        extra[component, group[0].group] = sum(own.beside[layer] for layer in layers)
    beside = max(model.loading_bytes, request.activations or 0)
    return Size(model.dense_bytes - dense, numel, beside, extra)


def limits_of(request: Request, size: Size, bandwidth: float | None = None, compute_ms: float = 0.0) -> Limits:
    """Return the limits of the program. bandwidth: bytes a second; compute_ms: of a step in which nothing travels.

    Without a bound on bytes (quality= alone) everything fits.
    """
    budgets = [budget for budget, _, _ in _budgets(request, size)]
    device_bytes = min(budgets, default=1 << 62)
    if request.step_ms is None:
        return Limits(device_bytes)
    assert bandwidth is not None
    travel = int(max(request.step_ms - compute_ms, 0) / 1000 * bandwidth)
    padding = SLOTS * 2 * PADDING_BYTES  # of a weight and a bias
    return Limits(device_bytes - padding, travel, SLOTS, size.extra)


def _budgets(request: Request, size: Size) -> list[tuple[int, str, int]]:
    """Yield (bytes of groups, setting, further bytes that count towards it) of each bound on bytes."""
    found = []
    if request.memory is not None:
        found.append((request.memory - size.fixed - size.beside, "memory", size.fixed + size.beside))
    if request.weights is not None:
        found.append((request.weights - size.fixed, "weights", size.fixed))
    if request.bits is not None:
        found.append((size.bytes_at(request.bits), "bits", 0))
    return found


def refuse_budget(request: Request, size: Size, groups: Groups, tried: str = "") -> ConfigError:
    """Return the error for a budget that nothing meets, with the smallest that can be met."""
    least = smallest_bytes(groups)
    for budget, name, others in _budgets(request, size):
        if budget < least and (name != "memory" or request.step_ms is None):  # else layers may rest elsewhere
            return ConfigError(_too_small(request, size, name, least, others))
    return ConfigError(
        f"{request.bounds}: no choice of formats and places keeps both{tried}; raise step_ms= or memory=, or name "
        "smaller formats: formats=[…]"
    )


def _too_small(request: Request, size: Size, name: str, least: int, others: int) -> str:
    if name == "bits":
        return (
            f"bits={request.bits:g} cannot be met: the smallest formats of all layers take {size.bits(least):.4f} bits "
            f"a weight; give at least bits={_rounded_up(size.bits(least))}, or smaller candidates: formats=[…]"
        )
    given = getattr(request, name)
    parts = [f"{format_memory(least / GIB)} for the layers in their smallest formats"]
    parts += [f"{format_memory(size.fixed / GIB)} for all other weights"]
    if name == "memory":
        parts.append(f"{format_memory(size.beside / GIB)} to load or to run them")
    return (
        f"{name}={format_memory(given / GIB).replace(' ', '')} cannot be met: the smallest mix takes "
        f"{', '.join(parts)}; give at least {name}={smallest_size(least + others)}, or smaller candidates: formats=[…]"
    )


def smallest_size(nbytes: int) -> str:
    """Return a size to type that is no less than so many bytes: '5.31GiB'."""
    unit, factor = next(((u, f) for u, f in (("GiB", GIB), ("MiB", 1 << 20)) if nbytes >= f), ("KiB", 1 << 10))
    return f"{-(-nbytes * 100 // factor) / 100:.2f}{unit}"


def _rounded_up(bits: float) -> str:
    return f"{-int(-bits * 100 // 1) / 100:.2f}"


def budgets_between(least: int, most: int, count: int) -> list[int]:
    """Return the budgets of a front, evenly spaced in ratio, from the smallest mix to the largest."""
    if most <= least or count < 2:
        return [least]
    return [round(least * (most / least) ** (number / (count - 1))) for number in range(count)]
