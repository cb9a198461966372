"""What a load says before it reads weights: of what stays unquantized and unread, how much, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from qexp.errors import first_names
from qexp.loading.plan import LoadPlan
from qexp.quantizers.base import Quantizer
from qexp.system.memory import GIB

LARGE_SHARE = 0.2  # of weights that cannot be quantized: more is worth a warning


def notices(component: str, plan: LoadPlan) -> Iterator[str]:
    """Yield the messages about a plan, a line each."""
    if plan.unused:
        places = "tensors of the checkpoint have no place in the model and are not read"
        yield f"{component}: {len(plan.unused)} {places}: {first_names(plan.unused)}"
    if plan.left_dense:
        yield left_dense_message(component, plan)
    if plan.quantized and (message := not_linear_message(component, plan)):
        yield message


def left_dense_message(component: str, plan: LoadPlan) -> str:
    """Name the linear layers that stay unquantized though nobody asked for it."""
    share, count = plan.left_dense_share, len(plan.left_dense)
    named = ", ".join(f"'{name}' ({plan.skipped[name]})" for name in plan.left_dense[:3])
    return (
        f"{'warning: ' if share > LARGE_SHARE else ''}{component}: {count} linear layer{'s' if count > 1 else ''} "
        f"({share:.1%} of its weights) unquantized though nobody asked for it: {named}{' …' if count > 3 else ''}; "
        "another backend or block size may hold them, and skip_modules says that it is meant so"
    )


def not_linear_message(component: str, plan: LoadPlan) -> str | None:
    """Return a warning, if weights that no format quantizes are a large part of the model."""
    items = [item for item in plan.distinct if item.target in plan.not_linear]
    share = sum(item.numel for item in items) / max(sum(item.numel for item in plan.distinct), 1)
    if share <= LARGE_SHARE:
        return None
    items.sort(key=lambda item: -item.result_nbytes)
    shown = ", ".join(f"'{item.target}' ({plan.not_linear[item.target]})" for item in items[:3])
    return (
        f"warning: {component}: {share:.0%} of its weights are not those of linear layers and stay unquantized, "
        f"{sum(item.result_nbytes for item in items) / GIB:.2f} GiB: {shown}{' …' if len(items) > 3 else ''}"
    )


def nothing_message(component: str, quantizer: Quantizer, skipped: Mapping[str, str]) -> str:
    reasons = ", ".join(f"'{name}' ({reason})" for name, reason in list(skipped.items())[:3])
    if quantizer.stored:
        return (
            f"'{component}' is a checkpoint of {quantizer.quantization_method}, but no quantized weight is a linear "
            f"layer's: {reasons or 'the model has none'}; check that its "
            "config.json belongs to it, and skip_modules"
        )
    why = f"every linear layer is skipped: {reasons}" + (" …" if len(skipped) > 3 else "")
    return (
        f"backend {quantizer.quantization_method!r} would have quantized no layer of '{component}': "
        f"{why if skipped else 'it has no linear layers'}; loosen skip_modules, or use backend=none"
    )
