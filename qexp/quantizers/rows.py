"""Iterate over slices of rows of a dense weight, and assemble the quantized slices.

Library kernels need several times their input in temporary memory. Slices of a million weights keep that small, and
their results stay in the processor's last-level cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from qexp.errors import LoadError
from qexp.system.memory import take_pages

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SMALL = 1 << 16  # numbers for which a call takes longer than the work
SLICE_WEIGHTS = {"cpu": 1 << 20, "cuda": 1 << 22}  # weights per call of a library kernel


@dataclass(frozen=True)
class WeightSpec:
    """A linear weight to quantize.

    module: dotted name. shape: [out, in]. dtype: quantized from. transposed: the network's own layer, and an
    unquantized checkpoint, store it as [in, out].
    """

    module: str
    shape: tuple[int, int]
    dtype: torch.dtype
    transposed: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class Rows(Protocol):
    """A dense weight with rows that are read from the checkpoint on demand."""

    @property
    def dtype(self) -> torch.dtype: ...

    def __getitem__(self, rows: slice, /) -> Tensor: ...

    def send(self, target: Tensor, start: int, /) -> None:
        """Read rows from `start` on into memory of an accelerator."""


def row_slices(
    spec: WeightSpec, weight: Tensor | Rows, device: torch.device, rows_multiple: int = 1, check: bool = True
) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of whole rows of a dense weight, contiguous on `device`, in the dtype it is quantized from.

    Every slice but the last has a multiple of `rows_multiple` rows; a slice has one row only if the weight has one. The
    memory of a slice may be reused for the next one.
    Raises: LoadError for values that are not finite, also after the cast to `spec.dtype`; with check=False the caller
    checks, for example the scales (`check_slice`).
    """

    rows, columns = spec.shape
    step = max(SLICE_WEIGHTS.get(device.type, SLICE_WEIGHTS["cpu"]) // max(columns, 1), 2)
    step = math.ceil(step / rows_multiple) * rows_multiple
    start = 0
    while start < rows:
        stop = rows if rows - start <= step + 1 else start + step
        # contiguous: kernels take addresses, not strides
        part = _cast_part(_rows_on(device, weight, start, stop, columns), spec.dtype).contiguous()
        if check:
            check_slice(spec, slice(start, stop), part)
        yield slice(start, stop), part
        start = stop


def _rows_on(device: torch.device, weight: Tensor | Rows, start: int, stop: int, columns: int) -> Tensor:
    import torch

    if device.type == "cpu" or isinstance(weight, torch.Tensor):
        return weight[start:stop].to(device)
    part = torch.empty((stop - start, columns), dtype=weight.dtype, device=device)
    weight.send(part, start)
    return part


def _cast_part(part: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast to a dtype; from bf16 to fp16 through fp32, which is exact and four times as fast on a CPU."""
    is_slow = part.itemsize == 2 and dtype.itemsize == 2 and part.dtype != dtype
    return part.float().to(dtype) if is_slow and part.device.type == "cpu" else part.to(dtype)


def check_slice(spec: WeightSpec, rows: slice, values: Tensor) -> None:
    """Raise LoadError if rows of a weight are not finite. values: the rows, or scales that are finite only then."""
    if not is_finite(values):
        raise LoadError(
            f"the weight of '{spec.module}' is not finite in {str(spec.dtype).removeprefix('torch.')} "
            f"(rows {rows.start} to {rows.stop - 1}); a quantized layer cannot hold it. Repair the checkpoint; if it "
            f"is this dtype that overflows, use another compute_dtype, or add '{spec.module}' to skip_modules"
        )


def is_finite(tensor: Tensor) -> bool:
    """Return whether every value is finite, in one pass and without a temporary, unlike `isfinite().all()`."""
    import torch

    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    if tensor.itemsize == 1:  # float8, for which aminmax is not there
        return not bool(tensor.isnan().any())
    is_small = tensor.numel() < SMALL
    if (is_small or tensor.dtype == torch.bfloat16) and math.isfinite(tensor.sum().item()):
        return True  # a third faster than the extremes, or one call of PyTorch; a sum that overflows decides nothing
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def check_parameters(module: str, part: str, tensor: Tensor) -> None:
    """Raise LoadError for scales or offsets of a stored weight that are not finite."""
    if tensor.itemsize > 1 and not is_finite(tensor):
        raise LoadError(
            f"the {part} of the quantized weight of '{module}' is not finite; download the checkpoint again"
        )


def clear_nan(values: Tensor) -> None:
    """Replace NaN by zero in float8 values, in place: the libraries divide a row of zeros by its scale, zero."""
    import torch

    if not values.is_floating_point() or values.numel() == 0:
        return
    bits = values.view(torch.uint8)
    infinity = 0x7C if values.dtype == torch.float8_e5m2 else 0x7E  # e4m3fn has none: its largest number
    if int((bits & 0x7F).max()) > infinity:  # far faster to tell than which they are
        bits[values.isnan()] = 0


class RowAssembler:
    """Assembles the inner tensors of quantized row slices; each slice is written into its place immediately.

    Every inner tensor must grow along its first dimension in proportion to the rows of the weight.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.inner: dict[str, Tensor] = {}

    def add(self, part: slice, inner: Mapping[str, Tensor]) -> None:
        """Copy the inner tensors of a slice of rows to their places."""
        for name, tensor in inner.items():
            self.room(name, part, tensor.shape, tensor.dtype, tensor.device).copy_(tensor)

    def room(
        self, name: str, part: slice, shape: Sequence[int], dtype: torch.dtype, device: torch.device | None = None
    ) -> Tensor:
        """Return the place of an inner tensor of a slice of rows, for the caller to write."""
        import torch

        per_row, remainder = divmod(shape[0], part.stop - part.start)
        assert remainder == 0, (name, shape, part)
        if name not in self.inner:
            self.inner[name] = torch.empty((per_row * self.rows, *shape[1:]), dtype=dtype, device=device)
        place = self.inner[name][part.start * per_row : part.stop * per_row]
        if place.device.type == "cpu":
            take_pages(place.data_ptr(), place.nbytes)
        return place
