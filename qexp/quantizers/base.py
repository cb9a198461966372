"""The base class of quantization backends: the hooks of the quantize-on-load lifecycle.

A backend is one file in this folder. It declares `Config`, a frozen dataclass on top of `configs.BackendConfig` whose
`quant_method` is the file's name, and `Quantizer`, a subclass of the class below. Neither may import torch or its
library at module level: the process that composes experiments reads the configs and must stay light.

Weights reach a quantizer one by one, on worker threads. `create_quantized_param` gets the dense tensors and returns a
parameter; it never sees the model. It feeds library kernels, which need several times their input in temporary memory,
with slices of the weight (`rows.py`).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from packaging.version import Version

from qexp.config.recipe import format_name
from qexp.errors import MissingLibraryError
from qexp.quantizers.layers import dense_linear, refuse_without_weights, replace_module, weight_shape
from qexp.quantizers.rows import WeightSpec
from qexp.results.environment import versions_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from qexp.checkpoints.tensor_entry import TensorEntry

# torch imports it with the first operation on a tensor whose class has a __torch_dispatch__: a CPU second
FOR_DISPATCH = "torch.distributed.tensor"
FP32_MODULES = "_keep_in_fp32_modules"  # of a class of diffusers, which it skips by the same rule


class Quantizer:
    """The hooks, in the order in which a load calls them. The defaults quantize nothing."""

    required_packages: ClassVar[Mapping[str, str]] = {}  # package -> lowest version that works
    # modules that quantizing or running imports, and functions that import more (module:function)
    imports: ClassVar[tuple[str, ...]] = ()
    has_kernels: ClassVar[bool] = False  # whether it quantizes with compiled loops on a CPU
    rows_alone: ClassVar[bool] = False  # whether a row becomes the same whichever rows are quantized with it
    decodes_with_kernels: ClassVar[bool] = False  # whether its layers, and weights that are stored quantized, do too
    is_trainable: bool = True  # whether gradients flow through a layer to its input
    has_backward: bool = True  # the library implements backward; if False, loading/straight_through.py does
    is_serializable: ClassVar[bool] = False  # whether `stored_parts` reads what is saved
    file_format: str = "safetensors"  # or gguf: what a saved model is stored in
    # set when a model is registered: removes the attributes that mark the model as quantized
    unregister: Callable[[nn.Module, Quantizer], None] | None = None

    def __init__(self, config: Any) -> None:
        self.config = config
        self.stored = False  # whether the checkpoint holds quantized weights already
        self.metadata: Mapping[str, str] = {}  # of its files, then

    def mark_stored(self, metadata: Mapping[str, str]) -> None:
        """Read quantized weights of a checkpoint from now on. metadata: of its files."""
        self.stored, self.metadata = True, metadata

    @property
    def quantization_method(self) -> str:
        return str(self.config.quant_method)

    @property
    def skip_modules(self) -> tuple[str, ...]:
        """Patterns from the backend's own field for unquantized layers.

        Empty for a quantized checkpoint: its list names the layers stored unquantized, by upstream's rules.
        """
        return () if self.stored else tuple(getattr(self.config, self.config.skip_field, ()))

    @property
    def requires_calibration(self) -> bool:
        """Whether `calibrate` must be called before the first forward."""
        return False

    def calibrate(self, model: nn.Module, run: Callable[[], object]) -> None:
        """Set activation scales from samples that `run` feeds through the model.

        Raises: ConfigError if the samples do not reach every layer.
        """

    @property
    def model_attributes(self) -> Mapping[str, Any]:
        """Attributes that upstream sets on a model of this format, beyond those of every quantized model."""
        return {}

    @classmethod
    def needs_kernels(cls, *, stored: bool) -> bool:
        """Return whether a load, or what is run with the model, calls compiled loops on a CPU, which LLVM reads.
        stored: whether the checkpoint is quantized already."""
        return cls.decodes_with_kernels or (cls.has_kernels and not stored)

    def validate_environment(self, device: torch.device) -> None:
        """Raise MissingLibraryError or UnsupportedError before a byte is read."""
        for package, found in versions_of(self.required_packages).items():
            lowest = self.required_packages[package]
            if found is None or Version(found) < Version(lowest):
                raise MissingLibraryError(
                    f"backend.quant_method={self.quantization_method} needs {package} >= {lowest}; "
                    f"found {found or 'none'}. Install it: pip install '{package}>={lowest}'"
                )

    def update_torch_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the compute dtype to use for a requested one."""
        return dtype

    def update_device_map(self, device_map: Any) -> Any:
        """Return the device map to use for a requested one."""
        return device_map

    # The next three are for planners of other libraries, accelerate's above all, which count elements times a size.
    # Our own counts the bytes of the plan (loading/device_map.py), and quantizing takes a few slices beside them.

    def adjust_target_dtype(self, target_dtype: Any) -> Any:
        """Return the dtype, of torch or accelerate, closest in size to a quantized weight."""
        from accelerate.utils import CustomDtype
        from torch import bfloat16, int8

        if self.quantization_method == "none":
            return target_dtype
        large = WeightSpec("", (4096, 4096), bfloat16)
        bits = 8 * self.quantized_nbytes(large) / large.numel
        sizes = {2: CustomDtype.INT2, 4: CustomDtype.INT4, 8: int8}
        return next((dtype for size, dtype in sizes.items() if bits <= size + 0.6), target_dtype)  # 0.6: the scales

    def get_special_dtypes_update(self, model: nn.Module, torch_dtype: torch.dtype) -> dict[str, torch.dtype]:
        """Return parameter -> dtype for the parameters that are not quantized."""
        quantized = {f"{name}.weight" for name, module in model.named_modules() if self.is_quantized(module)}
        return {name: torch_dtype for name, _ in model.named_parameters() if name not in quantized}

    def adjust_max_memory(self, max_memory: Mapping[Any, Any]) -> dict[Any, Any]:
        """Return limits that reserve a tenth for temporary memory, as upstream's quantizers do."""
        if self.quantization_method == "none":
            return dict(max_memory)
        return {device: size * 0.9 for device, size in max_memory.items()}

    def check_patterns(self, model: nn.Module, kept: Sequence[str], component: str) -> dict[str, str]:
        """Return the patterns in the backend's own settings that have no effect, each with its error message.

        model: the skeleton. kept: patterns that other settings leave unquantized.
        """
        return {}

    def part_of(self, layer: str) -> Quantizer:
        """Return the quantizer of one layer: of a mixed model, that of its rule."""
        return self

    def conflict(self, layers: Sequence[str]) -> str | None:
        """Return why layers that share one weight cannot have one format, or None."""
        return None

    def keeps_dense(self, layer: str) -> bool:
        """Return whether the backend's own settings say that a layer stays unquantized."""
        return False

    def layer_format(self, layer: str) -> str:
        """Return the name of a layer's format, for tables: 'gguf Q4_0'."""
        return format_name(self.config)

    def reason_to_skip(self, spec: WeightSpec) -> str | None:
        """Return why this format cannot hold a weight, or None. Raises ConfigError if a setting is wrong."""
        return None

    def hides(self, spec: WeightSpec) -> Collection[str]:
        """Return the attributes, of "dtype" and "shape", in which its quantized weight differs from the dense one."""
        return ()

    def preprocess_model(self, model: nn.Module, names: Sequence[str], compute_dtype: torch.dtype) -> None:
        """Replace the named modules, all on meta, by ones that hold quantized weights."""

    def quantized_nbytes(self, spec: WeightSpec) -> int:
        """Return the exact bytes of the quantized weight, including scales and other inner tensors."""
        raise NotImplementedError

    def format_key(self, spec: WeightSpec) -> Any:
        """Return a key of a layer's format; layers that share one weight must have equal keys."""
        return None

    def takes_rows(self, spec: WeightSpec) -> bool:
        """Return whether a dense weight is quantized slice by slice, with rows read on demand.

        Otherwise it is read whole, into the staging buffer.
        """
        return True

    def create_quantized_param(
        self, spec: WeightSpec, sources: Sequence[Tensor], companions: Mapping[str, Tensor], device: torch.device
    ) -> nn.Parameter:
        """Quantize one dense weight, sources[0], on `device`. Called from worker threads, without grad.

        sources[0] may be a weight whose rows are read on demand; `row_slices` accepts both.
        If `stored_parts` found this weight, it is already quantized: sources[0] and the companions are its inner
        tensors, and the parameter is assembled from them, without a copy if they are on `device`.
        """
        raise NotImplementedError

    def stored_dtype(self) -> torch.dtype | None:
        """Return a checkpoint's default compute dtype; None: the most frequent dtype of its unquantized tensors."""
        return None

    def stored_parts(self, name: str, entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry] | None:
        """Return the inner tensors of a quantized weight in a checkpoint, in the format's order; None if it is dense.

        name: of the layer.
        """
        return None

    def check_quantized_param_shape(self, spec: WeightSpec, parts: Mapping[str, TensorEntry]) -> None:
        """Raise LoadError for stored parts that do not fit this weight."""

    def stored_alignment(self, spec: WeightSpec) -> int:
        """Return the alignment in bytes with which its kernels on a CPU compute the same bits as in allocated memory.

        Off it, vectors begin elsewhere, sums are added up in another order, and some kernels crash.
        """
        return 64

    def stored_nbytes(self, spec: WeightSpec, parts: Mapping[str, TensorEntry]) -> int:
        """Return the exact bytes of a weight assembled from stored parts."""
        return sum(entry.nbytes for entry in parts.values())

    def get_state_dict_and_metadata(self, state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return (tensors, file metadata) of a state dict in this format, as `stored_parts` reads them."""
        return dict(state_dict), {}

    def as_safetensors(self, state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return state dict and metadata as `get_state_dict_and_metadata` does, always for a safetensors file."""
        return self.get_state_dict_and_metadata(state_dict)

    def common_format(self, layers: Mapping[str, Quantizer | None]) -> Quantizer | None:
        """Return the quantizer whose files can hold a whole model, or None if there is none.

        layers: every linear layer, with the quantizer of its weight, all of one backend; None where it stays dense.
        """
        return self if have_one_config([part.config for part in layers.values() if part is not None]) else None

    def misread(self, model: nn.Module, is_of_transformers: bool) -> str | None:
        """Return how the model's own library would misread this saved model, or None if it reads it correctly."""
        if is_of_transformers:
            return None
        kept = [*(self.to_dict(model).get(self.config.skip_field) or ()), *(getattr(model, FP32_MODULES, None) or ())]
        for name, module in model.named_modules():
            taken = self.taken_by_diffusers(name, kept) if weight_shape(module) is not None else None
            if taken is not None and taken != self.is_quantized(module):
                kind = "a quantized layer" if taken else "a dense layer"
                return f"diffusers reads '{name}' as {kind}, because of other layers' names, with different weights"
        return None

    def taken_by_diffusers(self, layer: str, kept: Sequence[str]) -> bool | None:
        """Return whether diffusers would read a saved linear layer as quantized; None if it decides by the file.

        kept: the saved list of unquantized layers.
        """
        return None

    def under_refused_names(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename or reshape saved tensors so that other libraries reject them; `stored_parts` reads them, too."""
        return dict(tensors)

    def to_dict(self, model: nn.Module) -> dict[str, Any]:
        """Return the `quantization_config` of a saved model, which lists every unquantized layer."""
        return {**self.config.to_dict(), self.config.skip_field: unquantized_layers(self, model)}

    def update_missing_keys(self, missing: Sequence[str]) -> list[str]:
        """Remove the keys that `postprocess_model` sets, which a checkpoint may lack."""
        return list(missing)

    def is_quantized(self, module: nn.Module) -> bool:
        """Return whether this module holds a quantized weight (called by the audit)."""
        return False

    def postprocess_model(self, model: nn.Module, device: torch.device) -> None:
        """Finish the model after all weights are assigned."""

    def dequantize_param(self, param: Any, dtype: torch.dtype) -> Tensor:
        """Return the dense weight [out, in] of a quantized parameter; by default one that decodes itself."""
        return param.dequantize(dtype)

    def restore_linear_layers(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Replace quantized layers by ordinary linear layers of a dtype."""
        import torch

        restored: dict[nn.Module, nn.Module] = {}  # a layer used twice stays one
        dense: dict[Any, nn.Parameter] = {}  # and so does a weight of two layers
        for name, module in list(model.named_modules(remove_duplicate=False)):
            if not self.is_quantized(module):
                continue
            if module not in restored:
                with torch.no_grad():
                    new: Any = dense_linear(module, self.dequantize_param(module.weight, dtype))
                new.weight = dense.setdefault((id(module.weight), new.weight.shape), new.weight)
                restored[module] = new
            replace_module(model, name, restored[module])

    def dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        """Replace quantized layers by ordinary linear layers, in place, and remove the marks of quantization.

        Other libraries call this method. dtype: of the weights; None is the dtype that they were quantized from. An
        offloaded model is offloaded again.
        Raises: ConfigError if another library's hooks hold the weights.
        """
        from qexp.offloading.strategies import resident

        refuse_without_weights(model)
        loaded: Any = model
        with resident(model):
            self.restore_linear_layers(model, dtype or loaded._pre_quantization_dtype)
            if self.unregister is not None:
                self.unregister(model, self)
        return model


def load_quantizer(config: Any) -> Quantizer:
    """Return the quantizer of a backend config."""
    return importlib.import_module(f"qexp.quantizers.{config.quant_method}").Quantizer(config)


def have_one_config(configs: Sequence[Any]) -> bool:
    """Return whether all configs are equal apart from their labels."""
    plain = [replace(config, label=None) for config in configs]
    return all(config == plain[0] for config in plain)


def unquantized_layers(quantizer: Quantizer, model: nn.Module) -> list[str]:
    """Return the names of the unquantized linear layers, as saved configs list them."""
    linear = [(name, module) for name, module in model.named_modules() if weight_shape(module) is not None]
    return [name for name, module in linear if not quantizer.is_quantized(module)]
