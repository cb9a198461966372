"""Quantize and dequantize every layer on its own and compare it with the weight in the checkpoint.

Layers stream through `loading/streaming` one by one: neither the dense nor the quantized model is ever in memory.
Weights that a checkpoint holds ready quantized are compared with those of the original checkpoint, read beside them.
`backend=none` casts each linear weight to the compute dtype and back, like any other format.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, ClassVar

from qexp.config.task import TaskConfig

if TYPE_CHECKING:
    from torch import Tensor

    from qexp.checkpoints.checkpoint import Checkpoint
    from qexp.config.schema import LoaderConfig
    from qexp.loading.component import Prepared
    from qexp.loading.work_item import WorkItem


ORIGINAL = "original"  # the dense weight, among the parts of a ready-quantized one


@dataclass(frozen=True)
class RoundtripConfig(TaskConfig):
    name: str = "roundtrip"

    saves_outputs: ClassVar[bool] = False  # nothing to compare with a reference, or to score
    is_seeded: ClassVar[bool] = False


Config = RoundtripConfig


@dataclass(frozen=True)
class LayerRow:
    """One line of layers.csv. Errors compare with the checkpoint's weight; an exact layer has no sqnr_db."""

    component: str
    layer: str
    out_features: int
    in_features: int
    stored_dtype: str
    format: str
    quantized_bytes: int
    bits_per_weight: float
    sqnr_db: float | None
    relative_l2: float | None
    cosine: float | None
    max_abs_error: float | None


def measure_layers(prepared: Prepared, *, loader: LoaderConfig, original: Checkpoint | None = None) -> list[LayerRow]:
    """Return a row for every layer that the plan quantizes (with backend=none: for every linear layer).

    original: the dense checkpoint that a checkpoint of ready-quantized weights was made from.
    Raises: LoadError if it has not all of their dense weights.
    """
    from qexp.loading.weights import stream_plan

    def create(item: WorkItem, *tensors: Tensor) -> LayerRow:
        *stored, dense = tensors  # without an original, the weight is all there is
        return _measure(prepared, item, stored, dense)

    items = prepared.plan.quantized or _linear_weights(prepared)
    # whole, whatever a load would do: the dense weight is compared with, and nothing that is read stays
    items = [replace(item, read="staged") for item in items]
    if original is not None:
        items = [_with_original(item, original) for item in items]
    return [row for _, row in stream_plan(items, create, loader, prepared.request.component, "measuring {} layers")]


def _with_original(item: WorkItem, original: Checkpoint) -> WorkItem:
    """Return the parts of a ready-quantized weight and, last, the dense weight that it was made from."""
    from qexp.checkpoints.conversion import transposed
    from qexp.checkpoints.dtypes import TORCH_DTYPES
    from qexp.errors import LoadError

    assert item.spec is not None  # such a plan has no other layers
    dense = original.entries.get(item.target)
    if dense is not None and item.spec.transposed:
        dense = transposed(dense)
    dtype = None if dense is None else TORCH_DTYPES.get(dense.dtype)
    if dense is None or dense.shape != item.spec.shape or dtype is None or not dtype.is_floating_point:
        found = "nothing" if dense is None else f"{dense.dtype} {list(dense.shape)}"
        raise LoadError(
            f"model.reference_path: '{original.path}' has {found} where '{item.target}' should be a dense weight of "
            f"shape {list(item.spec.shape)}; set it to the checkpoint that the quantized one was made from"
        )
    return replace(item, companions={**item.companions, ORIGINAL: dense})


def _linear_weights(prepared: Prepared) -> list[WorkItem]:
    from qexp.checkpoints.conversion import transposed
    from qexp.quantizers.layers import is_transposed, weight_shape

    layers = {f"{name}.weight": layer for name, layer in prepared.model.named_modules() if weight_shape(layer)}
    items = [item for item in prepared.plan.items if item.target in layers]
    return [
        replace(item, source=transposed(item.source)) if is_transposed(layers[item.target]) else item for item in items
    ]


def _measure(prepared: Prepared, item: WorkItem, stored: list[Tensor], dense: Tensor) -> LayerRow:
    from qexp.loading.weights import check_finite
    from qexp.metrics.tensors import compare
    from qexp.offloading.payload import true_nbytes

    device = prepared.request.device
    if item.spec is not None:
        first, *others = stored or [dense]
        companions = dict(zip(item.companions, others, strict=False))  # the last one is the original
        param: Tensor = prepared.quantizer.create_quantized_param(item.spec, [first], companions, device)
        restored = prepared.quantizer.dequantize_param(param, item.spec.dtype)
    else:
        param = restored = dense.to(device=device, dtype=item.dtype)
        check_finite(item.target, restored)
    compared, nbytes = compare(dense, restored), true_nbytes(param)
    return LayerRow(
        component=prepared.request.component,
        layer=item.target.removesuffix(".weight"),
        out_features=dense.shape[0],
        in_features=dense.shape[1],
        stored_dtype=str(dense.dtype).removeprefix("torch."),
        format=_format_of(prepared, item),
        quantized_bytes=nbytes,
        bits_per_weight=8 * nbytes / dense.numel(),
        **{name: getattr(compared, name) for name in ("sqnr_db", "relative_l2", "cosine", "max_abs_error")},
    )


def _format_of(prepared: Prepared, item: WorkItem) -> str:
    """Return the name of a layer's format; of one that is cast alone, its dtype."""
    return str(item.dtype).removeprefix("torch.") if item.spec is None else prepared.plan.formats[item.spec.module]


def nonfinite_layers(rows: list[LayerRow]) -> list[str]:
    """Return the layers whose restored weights are not finite: they have no error, and take no part in means."""
    return [row.layer for row in rows if row.max_abs_error is None]


def summarize(rows: list[LayerRow]) -> dict[str, float | None]:
    """Return the `roundtrip/` metrics: means and worst cases over layers; None where every layer is exact."""
    sqnr = [row.sqnr_db for row in rows if row.sqnr_db is not None]
    errors = [row.relative_l2 for row in rows if row.relative_l2 is not None]
    return {
        "roundtrip/layers": len(rows),
        "roundtrip/exact_layers": sum(row.max_abs_error == 0 for row in rows),
        "roundtrip/nonfinite_layers": len(nonfinite_layers(rows)),
        "roundtrip/inexact_layers": len(sqnr),
        "roundtrip/finite_layers": len(errors),
        "roundtrip/sqnr_db_mean": statistics.fmean(sqnr) if sqnr else None,
        "roundtrip/sqnr_db_min": min(sqnr, default=None),
        "roundtrip/relative_l2_mean": statistics.fmean(errors) if errors else None,
        "roundtrip/cosine_min": min((row.cosine for row in rows if row.cosine is not None), default=None),
        "roundtrip/max_abs_error": max(
            (row.max_abs_error for row in rows if row.max_abs_error is not None), default=None
        ),
    }


def rows_to_csv(rows: list[LayerRow]) -> str:
    from qexp.system.files import to_csv

    return to_csv([field.name for field in fields(LayerRow)], [asdict(row) for row in rows])
