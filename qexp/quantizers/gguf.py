"""GGUF: the block formats of llama.cpp, 4 to 8 bits (and ternary, and MXFP4) on ordinary linear layers.

Q8_0, Q5_0 and Q4_0 have an fp16 scale for 32 weights; Q5_1 and Q4_1 a minimum beside it; MXFP4 a power of two.
TQ1_0 and TQ2_0 (blocks of 256) are for models trained with weights -1, 0, 1; they ruin others. K and IQ types can only
be read: llama.cpp creates them by a search of its own. A layer with in_features that are not a multiple of the block
stays unquantized, as in llama.cpp.

A `.gguf` checkpoint keeps its blocks, of any type; a GGUF-quantized model is saved as a `.gguf` file.

Weights are quantized from the run's compute dtype, with the bytes of gguf-py, and decoded in fp32 to the dtype that
the layer multiplies in: `compute_dtype`, or the run's. Formats: `checkpoints/gguf_types.py`, `gguf_blocks/encode.py`,
`gguf_blocks/decode.py`.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from typing_extensions import override

from qexp.checkpoints.gguf_types import DECODABLE, ENCODABLE, TYPES
from qexp.errors import ConfigError, LoadError, choices, did_you_mean
from qexp.quantizers import base
from qexp.quantizers.configs import BackendConfig
from qexp.quantizers.rows import RowAssembler, WeightSpec, row_slices
from qexp.quantizers.stored import Part, check_parts

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from qexp.checkpoints.tensor_entry import TensorEntry


# metadata that qexp writes; without it a file is computed in fp32, upstream's default
MODEL_DTYPE_KEY, COMPUTE_DTYPE_KEY = "qexp.dtype", "qexp.compute_dtype"
SAVED_DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class GGUFConfig(BackendConfig):
    """Settings of GGUF quantization.

    quant_type: of quantized weights. compute_dtype: of the products; null is the run's. pre_quantized: the checkpoint
    holds GGUF blocks, mostly of `quant_type` (set when the checkpoint is opened).
    """

    quant_method: str = "gguf"
    quant_type: str = "Q8_0"
    compute_dtype: str | None = None
    modules_to_not_convert: tuple[str, ...] = ()
    pre_quantized: bool = False

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        name = self.quant_type
        if name in ENCODABLE or (self.pre_quantized and name in DECODABLE):
            return
        why, remedy = f"is unknown{did_you_mean(name, ENCODABLE)}", f"use {choices(ENCODABLE)}"
        if name in DECODABLE:
            why = "can be read from files, but weights cannot be quantized to it"
        elif name in TYPES and TYPES[name].block == 1:
            why, remedy = "does not quantize", f"{remedy}, or backend=none with compute_dtype"
        raise ConfigError(f"backend.quant_type={name!r} {why}; {remedy}")

    @classmethod
    @override
    def types(cls) -> list[dict[str, Any]]:
        return [{"quant_type": name} for name in ENCODABLE]

    @override
    def describe(self) -> str | None:
        return self.quant_type


class GGUFQuantizer(base.Quantizer):
    config: GGUFConfig
    required_packages: ClassVar[Mapping[str, str]] = {"gguf": "0.19"}  # has the tables of the IQ types
    imports: ClassVar[tuple[str, ...]] = (
        "qexp.quantizers.gguf_blocks.encode",
        "qexp.quantizers.gguf_blocks.tensor",
        base.FOR_DISPATCH,
    )
    has_kernels = True
    rows_alone = True
    decodes_with_kernels = True
    is_serializable: ClassVar[bool] = True
    file_format = "gguf"

    def __init__(self, config: GGUFConfig) -> None:
        super().__init__(config)
        self._stored_types: dict[str, str] = {}  # layer -> the type in which the checkpoint holds its weight

    @property
    @override
    def skip_modules(self) -> tuple[str, ...]:
        return self.config.modules_to_not_convert  # always the user's: a file has no such list

    @override
    def stored_dtype(self) -> torch.dtype | None:
        """Return the dtype in the file's metadata, else upstream's default for GGUF."""
        import torch

        name = saved_dtype(self.metadata, MODEL_DTYPE_KEY) or self.config.compute_dtype or "float32"
        return getattr(torch, name)

    @override
    def reason_to_skip(self, spec: WeightSpec) -> str | None:
        if self.config.pre_quantized:
            raise ConfigError(
                "backend.pre_quantized=true, but the checkpoint has no GGUF blocks; set model.path to a .gguf file, "
                "or backend.pre_quantized=false"
            )
        block = TYPES[self.config.quant_type].block
        if spec.shape[1] % block:
            return f"{self.config.quant_type} has blocks of {block} weights, which do not divide {spec.shape[1]}"
        return None

    @override
    def quantized_nbytes(self, spec: WeightSpec) -> int:
        return TYPES[self.config.quant_type].nbytes(spec.shape)

    @override
    def create_quantized_param(
        self, spec: WeightSpec, sources: Sequence[Tensor], companions: Mapping[str, Tensor], device: torch.device
    ) -> nn.Parameter:
        from qexp.quantizers.gguf_blocks.encode import encode

        if spec.module in self._stored_types:
            return self.wrap(sources[0].to(device), self._stored_types[spec.module], spec.shape, spec.dtype)
        name, rows_of = self.config.quant_type, RowAssembler(spec.shape[0])
        for rows, part in row_slices(spec, sources[0], device):
            try:
                rows_of.add(rows, {"raw": encode(name, part)})
            except OverflowError as error:
                raise LoadError(
                    f"the weight of '{spec.module}' is too large for {name}, which stores scales in fp16: {error}; "
                    f"use backend.quant_type=MXFP4, or add '{spec.module}' to skip_modules"
                ) from None
        return self.wrap(rows_of.inner["raw"], name, spec.shape, spec.dtype)

    @override
    def stored_parts(self, name: str, entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry] | None:
        entry = entries.get(f"{name}.weight")
        if entry is None or not (entry.dtype == "U8" or (entry.block_type is not None and len(entry.shape) == 2)):
            return None
        self._stored_types[name] = entry.block_type or self.config.quant_type  # which safetensors files do not say
        return {"raw": entry}

    @override
    def stored_alignment(self, spec: WeightSpec) -> int:
        return 1  # blocks are decoded byte by byte; files align them to 32

    @override
    def get_state_dict_and_metadata(self, state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
        from qexp.quantizers.gguf_blocks.tensor import GGUFTensor

        own: Any = self.config.compute_dtype
        dtype = next(tensor.dtype for tensor in state_dict.values() if isinstance(tensor, GGUFTensor))
        metadata = {MODEL_DTYPE_KEY: str(dtype).removeprefix("torch.")}
        return dict(state_dict), metadata | ({} if own is None else {COMPUTE_DTYPE_KEY: own})

    @override
    def as_safetensors(self, state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the blocks as bytes, u8 [out, bytes of a row]."""
        from qexp.quantizers.gguf_blocks.tensor import GGUFTensor

        return {name: own.raw if isinstance(own, GGUFTensor) else own for name, own in state_dict.items()}, {}

    @override
    def common_format(self, layers: Mapping[str, base.Quantizer | None]) -> base.Quantizer | None:
        """Return a quantizer for mixed GGUF types: a file has a type for each tensor, and one compute dtype."""
        dtypes = {part.config.compute_dtype for part in layers.values() if part is not None}
        return self if len(dtypes) == 1 else None

    @override
    def layer_format(self, layer: str) -> str:
        return f"gguf {self._stored_types.get(layer, self.config.quant_type)}"

    @override
    def check_quantized_param_shape(self, spec: WeightSpec, parts: Mapping[str, TensorEntry]) -> None:
        entry = parts["raw"]
        if entry.dtype == "U8":
            quant_type = self._stored_types[spec.module]
            kind = TYPES[quant_type]
            row = spec.shape[1] // kind.block * kind.block_bytes
            check_parts(spec, parts, {"raw": Part(("U8",), ((spec.shape[0], row),))}, f"GGUF's {quant_type}")
            return
        if entry.shape != spec.shape:
            raise LoadError(
                f"'{entry.name}' has shape {list(entry.shape)} in '{entry.file}', but the model expects "
                f"{list(spec.shape)}; the file belongs to another model"
            )

    def wrap(self, raw: Tensor, quant_type: str, shape: Sequence[int], dtype: torch.dtype) -> nn.Parameter:
        """Wrap encoded bytes of a file in a parameter, without a copy.

        raw: uint8, of any shape. shape: [out, in]. dtype: the model's, which the weight reports as its own.
        Raises: LoadError for a type that cannot be decoded, or the wrong number of bytes.
        """
        import torch

        from qexp.quantizers.gguf_blocks.tensor import GGUFTensor

        if quant_type not in DECODABLE:
            raise LoadError(f"GGUF type {quant_type} cannot be decoded; convert the file to {choices(DECODABLE)}")
        kind, place = TYPES[quant_type], f"a {quant_type} weight of shape {list(shape)}"
        if shape[-1] % kind.block:
            raise LoadError(f"{place} is not made of whole blocks of {kind.block}; download the file again")
        if raw.numel() != kind.nbytes(shape):
            raise LoadError(f"{place} has {kind.nbytes(shape)} bytes, not {raw.numel()}; download the file again")
        own = self.config.compute_dtype
        compute_dtype = None if own is None else getattr(torch, own)
        weight = GGUFTensor(raw.view(shape[0], -1), quant_type, dtype, compute_dtype)
        return torch.nn.Parameter(weight, requires_grad=False)

    @override
    def is_quantized(self, module: nn.Module) -> bool:
        from qexp.quantizers.gguf_blocks.tensor import GGUFTensor

        return isinstance(getattr(module, "weight", None), GGUFTensor)


def saved_dtype(metadata: Mapping[str, str], key: str) -> str | None:
    """Return the compute dtype named in a file's metadata. Raises LoadError for an unknown one."""
    name = metadata.get(key)
    if name is not None and name not in SAVED_DTYPES:
        raise LoadError(
            f"metadata {key}={name[:50]!r} of a .gguf file is none of {choices(SAVED_DTYPES)}; save it again"
        )
    return name


Config = GGUFConfig
Quantizer = GGUFQuantizer
