"""bitsandbytes: NF4 and FP4 blockwise 4-bit weights, and LLM.int8 with its outlier threshold.

4-bit: blocks of 64 consecutive weights, or another power of two, share an absmax (fp32); each weight becomes the
nearest of 16 code values, two to a byte. Double quantization stores the absmaxes themselves in 8 bits, in blocks of
256 around their mean.
8-bit: each row is scaled by its absmax to -127..127; at run time, input columns with a value above
`llm_int8_threshold` are computed in 16 bits. The library computes 8-bit layers in fp16, whatever their inputs are in.

On CPUs with AVX512-BF16 the library would repack a 4-bit weight in place on its first forward, for a kernel that it
fetches from a hub. Both are turned off: a weight's bytes do not depend on the machine or on whether it has run.

Fields carry the names and defaults of upstream's `BitsAndBytesConfig`. Upstream loads such a model with a device_map
onto the current GPU, and refuses a machine without one; here `device=auto` means the same, and device_map stays null.
How weights are made: `bitsandbytes_support/create.py`; how checkpoints hold them: `bitsandbytes_support/stored.py`.
Sources: arXiv:2305.14314 (NF4, double quantization), arXiv:2208.07339 (LLM.int8).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from typing_extensions import override

from qexp.errors import ConfigError
from qexp.quantizers import base
from qexp.quantizers.bitsandbytes_support import stored
from qexp.quantizers.bitsandbytes_support.config import BitsAndBytesConfig
from qexp.quantizers.bitsandbytes_support.create import (
    NESTED_BLOCK_SIZE,
    create_4bit,
    create_8bit,
    show_as_stored,
    storage_dtype,
)
from qexp.quantizers.bitsandbytes_support.library import library
from qexp.quantizers.layers import replace_module
from qexp.quantizers.rows import WeightSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from qexp.checkpoints.tensor_entry import TensorEntry

NESTED_CODE_BYTES = 256 * 4
CODE_BYTES = 16 * 4


class BitsAndBytesQuantizer(base.Quantizer):
    config: BitsAndBytesConfig
    required_packages: ClassVar[Mapping[str, str]] = {"bitsandbytes": "0.50"}
    # its first product registers a kernel with torch, which imports the compiler
    imports: ClassVar[tuple[str, ...]] = ("qexp.quantizers.bitsandbytes_support.library:library", "torch._dynamo")
    has_kernels = True
    is_serializable = True

    @property
    @override
    def model_attributes(self) -> Mapping[str, Any]:
        bits = "4bit" if self.config.load_in_4bit else "8bit"
        return {f"is_loaded_in_{bits}": True, f"is_{bits}_serializable": True}

    @override
    def validate_environment(self, device: torch.device) -> None:
        super().validate_environment(device)
        if not self.config.is_quantizable():
            raise ConfigError(
                "backend.load_in_4bit and backend.load_in_8bit are both false, so nothing would be quantized; "
                "set one to true, or use backend=none"
            )
        if self.config.llm_int8_has_fp16_weight:
            raise ConfigError(
                "backend.llm_int8_has_fp16_weight=true keeps every weight in 16 bits and quantizes it in each forward "
                "pass, so no memory would be saved; set it to false"
            )
        library()

    @override
    def reason_to_skip(self, spec: WeightSpec) -> str | None:
        import torch

        if spec.shape[1] % 2:
            return "bitsandbytes needs an even in_features"
        itemsize = getattr(torch, self.config.bnb_4bit_quant_storage).itemsize
        if self.config.load_in_4bit and spec.numel // 2 % itemsize:
            return f"{spec.numel} 4-bit weights do not fill whole numbers of {self.config.bnb_4bit_quant_storage}"
        return None

    @override
    def hides(self, spec: WeightSpec) -> Collection[str]:
        if self.config.load_in_8bit:
            return ()
        is_seen = storage_dtype(self.config, spec) == spec.dtype
        return ("shape",) if is_seen else ("shape", "dtype")

    @override
    def preprocess_model(self, model: nn.Module, names: Sequence[str], compute_dtype: torch.dtype) -> None:
        import torch

        own = self.config.bnb_4bit_compute_dtype
        dtype_4bit = compute_dtype if own is None else getattr(torch, own)
        for name in names:
            linear = model.get_submodule(name)
            if self.config.load_in_4bit:
                new = self._linear_4bit(linear, dtype_4bit, compute_dtype)
            else:
                new = self._linear_8bit(linear)
            new.requires_grad_(False)
            replace_module(model, name, new.train(linear.training))

    def _linear_4bit(self, linear: Any, compute_dtype: torch.dtype, dtype: torch.dtype) -> nn.Module:
        new = library().nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=compute_dtype,
            compress_statistics=self.config.bnb_4bit_use_double_quant,
            quant_type=self.config.bnb_4bit_quant_type,
            quant_storage=storage_dtype(self.config, WeightSpec("", (linear.out_features, linear.in_features), dtype)),
            device="meta",
        )
        new.support_avx512bf16_for_cpu = False  # see the module's docstring
        if self.config.bnb_4bit_quant_storage == "uint8":
            new.register_state_dict_post_hook(show_as_stored)
        return new

    def _linear_8bit(self, linear: Any) -> nn.Module:
        return library().nn.Linear8bitLt(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            has_fp16_weights=False,
            threshold=self.config.llm_int8_threshold,
            device="meta",
        )

    @override
    def quantized_nbytes(self, spec: WeightSpec) -> int:
        if self.config.load_in_8bit:
            return spec.numel + 4 * spec.shape[0]
        blocks = math.ceil(spec.numel / self.config.bnb_4bit_blocksize)
        packed = math.ceil(spec.numel / 2) + CODE_BYTES
        if not self.config.bnb_4bit_use_double_quant:
            return packed + 4 * blocks
        return packed + blocks + 4 * math.ceil(blocks / NESTED_BLOCK_SIZE) + NESTED_CODE_BYTES + 4  # 4: the offset

    @override
    def create_quantized_param(
        self, spec: WeightSpec, sources: Sequence[Tensor], companions: Mapping[str, Tensor], device: torch.device
    ) -> nn.Parameter:
        if companions and self.config.load_in_4bit:
            return stored.assemble_4bit(spec, sources[0], companions, device, storage_dtype(self.config, spec))
        if companions:
            return stored.assemble_8bit(spec, sources[0], companions, device)
        if self.config.load_in_4bit:
            return create_4bit(self.config, spec, sources[0], device)
        return create_8bit(spec, sources[0], device)

    @override
    def stored_parts(self, name: str, entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry] | None:
        return stored.parts_4bit(name, entries) if self.config.load_in_4bit else stored.parts_8bit(name, entries)

    @override
    def check_quantized_param_shape(self, spec: WeightSpec, parts: Mapping[str, TensorEntry]) -> None:
        if self.config.load_in_4bit:
            stored.check_4bit(spec, parts, self.config.bnb_4bit_quant_storage)
        else:
            stored.check_8bit(spec, parts)

    @override
    def stored_nbytes(self, spec: WeightSpec, parts: Mapping[str, TensorEntry]) -> int:
        return stored.kept_nbytes(parts)

    @override
    def common_format(self, layers: Mapping[str, base.Quantizer | None]) -> base.Quantizer | None:
        """Return a quantizer for mixed 4-bit weights: each stores its type, block size and double quantization."""
        parts = [part for part in layers.values() if part is not None]
        if not all(part.config.load_in_4bit for part in parts):
            return super().common_format(layers)
        shared = {(part.config.bnb_4bit_quant_storage, part.config.bnb_4bit_compute_dtype) for part in parts}
        return max(parts, key=parts.count) if len(shared) == 1 else None

    @override
    def to_dict(self, model: nn.Module) -> dict[str, Any]:
        dtype = self.config.bnb_4bit_compute_dtype or str(model._pre_quantization_dtype).removeprefix("torch.")
        return {**super().to_dict(model), "bnb_4bit_compute_dtype": dtype}

    @override
    def taken_by_diffusers(self, layer: str, kept: Sequence[str]) -> bool | None:
        """Apply diffusers' rule: a layer is unquantized if a listed name equals its last part or occurs in its name."""
        is_named = layer.rpartition(".")[2] in kept or layer in kept
        return not is_named and not any(f"{name}." in layer for name in kept)

    @override
    def is_quantized(self, module: nn.Module) -> bool:
        weight = getattr(module, "weight", None)
        if isinstance(module, library().nn.Linear4bit):
            return getattr(weight, "quant_state", None) is not None
        return isinstance(module, library().nn.Linear8bitLt) and _int8_state(module)[0] is not None

    @override
    def postprocess_model(self, model: nn.Module, device: torch.device) -> None:
        """Share one state among 8-bit layers of one weight, since the first forward moves the values off the weight."""
        states: dict[int, Any] = {}
        for module in model.modules():
            if isinstance(module, library().nn.Linear8bitLt):
                module.state = states.setdefault(id(module.weight), module.state)

    @override
    def dequantize_param(self, param: Any, dtype: torch.dtype) -> Tensor:
        functional = library().functional
        if isinstance(param, library().nn.Params4bit):
            return functional.dequantize_4bit(param.data, param.quant_state).to(dtype)
        return functional.int8_vectorwise_dequant(param.CB, param.SCB).to(dtype)

    @override
    def restore_linear_layers(self, model: nn.Module, dtype: torch.dtype) -> None:
        for module in model.modules():
            if isinstance(module, library().nn.Linear8bitLt) and module.weight.CB is None:
                module.weight.CB, module.weight.SCB = _int8_state(module)  # a forward has moved them
        super().restore_linear_layers(model, dtype)


def _int8_state(module: Any) -> tuple[Tensor | None, Tensor | None]:
    """Return (values, scales) of an 8-bit layer: from its weight before the first forward, from its state after it."""
    if module.weight.CB is not None:
        return module.weight.CB, module.weight.SCB
    return module.state.CB, module.state.SCB


Config = BitsAndBytesConfig
Quantizer = BitsAndBytesQuantizer
