"""What a quantization backend provides: the hooks of the quantize-on-load lifecycle.

A backend is one file in this folder. It declares `Config`, a frozen dataclass on top of `configs.BackendConfig` whose
`quant_method` is the file's name, and `Quantizer`, a subclass of the class below. Neither may import torch or its
library at module level: the process that composes experiments reads the configs and must stay light.

Weights reach a quantizer one by one, on worker threads. `create_quantized_param` gets the dense tensors and returns a
parameter; it never sees the model. Library kernels need several times their input in temporary memory, so it feeds
them `row_slices` of a million weights: what they make of those stays in the processor's last cache.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from packaging.version import Version

from qexp.errors import LoadError, MissingLibraryError
from qexp.quantizers.layers import MARK, to_transposed, weight_shape
from qexp.system.memory import use_huge_pages

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from qexp.checkpoints.checkpoint import TensorEntry

SLICE_WEIGHTS = {"cpu": 1 << 20, "cuda": 1 << 22}  # weights a library kernel is given at a time


@dataclass(frozen=True)
class WeightSpec:
    """A linear weight to quantize: its module's dotted name, its shape [out, in], the dtype it is quantized from;
    transposed: the network's own layer, and an unquantized checkpoint, have it [in, out]."""

    module: str
    shape: tuple[int, int]
    dtype: torch.dtype
    transposed: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class Rows(Protocol):
    """A dense weight of which rows are read from the checkpoint when they are asked for."""

    @property
    def dtype(self) -> torch.dtype: ...

    def __getitem__(self, rows: slice, /) -> Tensor: ...

    def send(self, target: Tensor, start: int, /) -> None:
        """Read rows from `start` on into memory of an accelerator."""


class Quantizer:
    """The hooks, in the order in which a load calls them. The defaults quantize nothing."""

    required_packages: ClassVar[Mapping[str, str]] = {}  # package -> lowest version that works
    has_kernels: ClassVar[bool] = False  # whether it quantizes with those of `cpu_kernels/kernels.py` on a CPU
    is_trainable: ClassVar[bool] = True  # whether gradients flow through a layer, to what was there before it
    has_backward: ClassVar[bool] = True  # whether the library sees to that; else `loading/straight_through.py` does
    is_serializable: ClassVar[bool] = False  # whether `stored_parts` reads what is saved
    file_format: ClassVar[str] = "safetensors"  # or gguf: what a saved model is stored in

    def __init__(self, config: Any) -> None:
        self.config = config
        self.stored = False  # whether the checkpoint holds quantized weights already
        self.metadata: Mapping[str, str] = {}  # of its files, then

    @property
    def quantization_method(self) -> str:
        return str(self.config.quant_method)

    @property
    def skip_modules(self) -> tuple[str, ...]:
        """Patterns from the backend's own field for layers to leave alone.

        None of a checkpoint's own list: it names what is not stored quantized, in upstream's way.
        """
        return () if self.stored else tuple(getattr(self.config, self.config.skip_field, ()))

    @property
    def requires_calibration(self) -> bool:
        """Whether `calibrate` has to be called before the model answers."""
        return False

    def calibrate(self, model: nn.Module, run: Callable[[], object]) -> None:
        """Settle what depends on activations: `run` puts samples through the model. Raises ConfigError if they do not
        reach every layer."""

    @property
    def model_attributes(self) -> Mapping[str, Any]:
        """What upstream sets on a model of this format beside what it sets on every quantized one."""
        return {}

    def validate_environment(self, device: torch.device) -> None:
        """Raises MissingLibraryError or UnsupportedError before a byte is read."""
        for package, lowest in self.required_packages.items():
            try:
                found = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                found = None
            if found is None or Version(found) < Version(lowest):
                raise MissingLibraryError(
                    f"backend.quant_method={self.quantization_method} needs {package} >= {lowest}; "
                    f"found {found or 'none'}. Install it: pip install '{package}>={lowest}'"
                )
        if self.has_kernels and device.type == "cpu":
            from qexp.quantizers.cpu_kernels import kernels

            kernels.prepare()  # like the libraries: what it takes is not the model's

    def update_torch_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The compute dtype this backend works with, given the one asked for."""
        return dtype

    def update_device_map(self, device_map: Any) -> Any:
        """The map to load by, given the one asked for."""
        return device_map

    # The next three are for planners of other libraries, accelerate's above all, which count elements times a size.
    # Our own counts the bytes of the plan (loading/device_map.py), and quantizing takes a few slices beside them.

    def adjust_target_dtype(self, target_dtype: Any) -> Any:
        """The dtype, one of torch's or accelerate's, whose size comes nearest to that of a quantized weight."""
        from accelerate.utils import CustomDtype
        from torch import bfloat16, int8

        if self.quantization_method == "none":
            return target_dtype
        large = WeightSpec("", (4096, 4096), bfloat16)
        bits = 8 * self.quantized_nbytes(large) / large.numel
        sizes = {2: CustomDtype.INT2, 4: CustomDtype.INT4, 8: int8}
        return next((dtype for size, dtype in sizes.items() if bits <= size + 0.6), target_dtype)  # 0.6: the scales

    def get_special_dtypes_update(self, model: nn.Module, torch_dtype: torch.dtype) -> dict[str, torch.dtype]:
        """Parameters of a loaded model that are not quantized -> their dtype, for which the target dtype is wrong."""
        quantized = {f"{name}.weight" for name, module in model.named_modules() if self.is_quantized(module)}
        return {name: torch_dtype for name, _ in model.named_parameters() if name not in quantized}

    def adjust_max_memory(self, max_memory: Mapping[Any, Any]) -> dict[Any, Any]:
        """Limits that leave a tenth for what quantizing takes, as upstream's quantizers do."""
        if self.quantization_method == "none":
            return dict(max_memory)
        return {device: size * 0.9 for device, size in max_memory.items()}

    def reason_to_skip(self, spec: WeightSpec) -> str | None:
        """Why this format cannot hold a weight of this shape, or None. Raises ConfigError where a setting is wrong."""
        return None

    def preprocess_model(self, model: nn.Module, names: Sequence[str], compute_dtype: torch.dtype) -> None:
        """Swap the modules of these names, all on meta, for ones that hold quantized weights."""

    def quantized_nbytes(self, spec: WeightSpec) -> int:
        """Exact bytes of the quantized weight, scales and other inner tensors included."""
        raise NotImplementedError

    def takes_rows(self, spec: WeightSpec) -> bool:
        """Whether a dense weight is quantized in small slices, so that its rows may be read while they are asked for.
        If not, it is read whole, within the bound of what is in flight."""
        return True

    def create_quantized_param(
        self, spec: WeightSpec, sources: Sequence[Tensor], companions: Mapping[str, Tensor], device: torch.device
    ) -> nn.Parameter:
        """Quantize one dense weight, sources[0], on `device`. Called from worker threads, without grad.

        sources[0] may be a weight whose rows are read while they are asked for: `row_slices` takes either.
        If `stored_parts` found this weight, nothing is quantized: sources[0] and the companions are what it found, and
        the parameter is put together from them; they may become part of it if they are on `device`.
        """
        raise NotImplementedError

    def stored_dtype(self) -> torch.dtype | None:
        """The dtype that a checkpoint of this format is computed in where nobody asks for another; None: that of most
        of what it holds unquantized."""
        return None

    def stored_parts(self, name: str, entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry] | None:
        """The inner tensors by which a checkpoint holds the weight of layer `name` ready quantized, in the order of
        their names in this format; None if it holds the weight dense."""
        return None

    def check_quantized_param_shape(self, spec: WeightSpec, parts: Mapping[str, TensorEntry]) -> None:
        """Raises LoadError for stored parts that cannot be those of this weight."""

    def stored_nbytes(self, parts: Mapping[str, TensorEntry]) -> int:
        """Exact bytes of a weight that is put together from stored parts."""
        return sum(entry.nbytes for entry in parts.values())

    def get_state_dict_and_metadata(self, state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
        """(tensors, file metadata) by which this format stores a state dict; `stored_parts` finds them again."""
        return dict(state_dict), {}

    def to_dict(self, model: nn.Module) -> dict[str, Any]:
        """The `quantization_config` of a saved model: the config's, with every layer that is not quantized."""
        values: dict[str, Any] = self.config.to_dict()
        return {**values, self.config.skip_field: unquantized_layers(self, model)}

    def update_missing_keys(self, missing: Sequence[str]) -> list[str]:
        """Drop the keys that a checkpoint need not have because `postprocess_model` sets them."""
        return list(missing)

    def is_quantized(self, module: nn.Module) -> bool:
        """Whether this module holds a quantized weight (asked by the audit)."""
        return False

    def postprocess_model(self, model: nn.Module, device: torch.device) -> None:
        """Whatever is left to set once every weight is in place."""

    def dequantize_param(self, param: Tensor, dtype: torch.dtype) -> Tensor:
        """The dense weight [out, in] that a quantized parameter stands for."""
        raise NotImplementedError

    def restore_linear_layers(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Put ordinary linear layers of a dtype in the place of the quantized ones."""
        import torch

        restored: dict[nn.Module, nn.Module] = {}  # a layer used twice stays one
        for name, module in list(model.named_modules(remove_duplicate=False)):
            if not self.is_quantized(module):
                continue
            if module not in restored:
                with torch.no_grad():
                    restored[module] = dense_linear(module, self.dequantize_param(module.weight, dtype))
            replace_module(model, name, restored[module])

    def dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        """`qexp.loading.registration.dequantize`, in the place where other libraries call it."""
        from qexp.loading.registration import dequantize

        return dequantize(model, self, dtype)


def load_quantizer(config: Any) -> Quantizer:
    """The quantizer that belongs to a backend config."""
    quantizer: Quantizer = importlib.import_module(f"qexp.quantizers.{config.quant_method}").Quantizer(config)
    return quantizer


def once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Call a function once for each of its arguments, on whichever thread comes first; others wait, and get the same.

    With `functools.cache` each makes its own, and one is let go: memory of an accelerator, which streams may still use.
    """
    lock, known = threading.RLock(), dict[tuple[Any, ...], Any]()

    @wraps(function)
    def result(*arguments: Any) -> Any:
        if arguments not in known:
            with lock:
                if arguments not in known:
                    known[arguments] = function(*arguments)
        return known[arguments]

    return result


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back warnings while a library is imported: they are about kernels and machines that do not matter here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def unquantized_layers(quantizer: Quantizer, model: nn.Module) -> list[str]:
    """The names of the linear layers that hold no quantized weight, as saved configs list them."""
    linear = [(name, module) for name, module in model.named_modules() if weight_shape(module) is not None]
    return [name for name, module in linear if not quantizer.is_quantized(module)]


def dense_linear(module: nn.Module, weight: Tensor) -> nn.Module:
    """An ordinary linear layer around a dense weight and the bias of `module`; of the class that it stands for."""
    import torch
    from torch import nn

    if (kind := vars(module).get(MARK)) is not None:
        return to_transposed(kind, weight, module.bias).train(module.training)  # type: ignore[arg-type]
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if isinstance(module.bias, torch.Tensor):
        linear.bias = nn.Parameter(module.bias.to(weight.dtype), requires_grad=False)
    return linear.train(module.training)


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in the place of the module called `name` (dotted; not the model itself)."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def row_slices(
    spec: WeightSpec, weight: Tensor | Rows, device: torch.device, rows_multiple: int = 1, check: bool = True
) -> Iterator[tuple[slice, Tensor]]:
    """A dense weight in slices of whole rows, on `device`, contiguous, in the dtype it is quantized from.

    Every slice but the last has a multiple of `rows_multiple` rows; a slice has one row only if the weight has. A slice
    may lie where the next one will.
    Raises LoadError for a weight that is not finite, also when it leaves the range of `spec.dtype`; with check=False
    that is left to the caller, who may see it in the scales (`check_slice`).
    """

    rows, columns = spec.shape
    step = max(SLICE_WEIGHTS.get(device.type, SLICE_WEIGHTS["cpu"]) // max(columns, 1), 2)
    step = math.ceil(step / rows_multiple) * rows_multiple
    start = 0
    while start < rows:
        stop = rows if rows - start <= step + 1 else start + step
        part = _cast(
            _rows_on(device, weight, start, stop, columns), spec.dtype
        ).contiguous()  # kernels take addresses, not strides
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


def _cast(part: Tensor, dtype: torch.dtype) -> Tensor:
    """In a dtype; from bf16 to fp16 by way of fp32, which is exact, and four times as fast on a CPU."""
    is_slow = part.itemsize == 2 and dtype.itemsize == 2 and part.dtype != dtype
    return part.float().to(dtype) if is_slow and part.device.type == "cpu" else part.to(dtype)


def check_slice(spec: WeightSpec, rows: slice, values: Tensor) -> None:
    """Raises LoadError if these rows of a weight are not finite. values: they, or scales that are
    finite only if they are."""
    if not is_finite(values):
        raise LoadError(
            f"the weight of '{spec.module}' is not finite in {str(spec.dtype).removeprefix('torch.')} "
            f"(rows {rows.start} to {rows.stop - 1}); a quantized layer cannot hold it. Repair the checkpoint; if it "
            f"is this dtype that overflows, use another compute_dtype, or add '{spec.module}' to skip_modules"
        )


def is_finite(tensor: Tensor) -> bool:
    """Whether every value is; in one pass and without a temporary, unlike `isfinite().all()`."""
    import torch

    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def check_parameters(module: str, part: str, tensor: Tensor) -> None:
    """Raises LoadError for scales or offsets of a stored weight that are not finite."""
    if tensor.itemsize > 1 and not is_finite(tensor):
        raise LoadError(
            f"the {part} of the quantized weight of '{module}' is not finite; download the checkpoint again"
        )


def clear_nan(values: Tensor) -> None:
    """Make NaN zero in float8 values, in place: the libraries divide a row of zeros by its scale, which is zero."""
    import torch

    if not values.is_floating_point() or values.numel() == 0:
        return
    bits = values.view(torch.uint8)
    infinity = 0x7C if values.dtype == torch.float8_e5m2 else 0x7E  # e4m3fn has none: its largest number
    if int((bits & 0x7F).max()) > infinity:  # far faster to tell than which they are
        bits[values.isnan()] = 0


class RowAssembler:
    """Puts the inner tensors of quantized row slices together, each written into its place at once.

    Every inner tensor must grow along its first dimension in proportion to the rows of the weight.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.inner: dict[str, Tensor] = {}

    def add(self, part: slice, inner: Mapping[str, Tensor]) -> None:
        import torch

        count = part.stop - part.start
        for name, tensor in inner.items():
            per_row, remainder = divmod(tensor.shape[0], count)
            assert remainder == 0, (name, tensor.shape, count)
            if name not in self.inner:
                shape = (per_row * self.rows, *tensor.shape[1:])
                self.inner[name] = use_huge_pages(torch.empty(shape, dtype=tensor.dtype, device=tensor.device))
            self.inner[name][part.start * per_row : part.stop * per_row] = tensor
