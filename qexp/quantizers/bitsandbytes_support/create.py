"""Create bitsandbytes parameters from slices of rows: the library's bytes without its temporary memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from qexp.quantizers.bitsandbytes_support.library import library
from qexp.quantizers.cpu_kernels.readiness import are_ready
from qexp.quantizers.rows import RowAssembler, Rows, WeightSpec, check_slice, row_slices
from qexp.system.imports import once
from qexp.system.memory import take_pages

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from qexp.quantizers.bitsandbytes_support.config import BitsAndBytesConfig

NESTED_BLOCK_SIZE = 256


def create_4bit(
    config: BitsAndBytesConfig, spec: WeightSpec, weight: Tensor | Rows, device: torch.device
) -> nn.Parameter:
    import torch

    from qexp.quantizers.bitsandbytes_support.parameters import safe_from_casts

    functional, quant_type = library().functional, config.bnb_4bit_quant_type
    block = config.bnb_4bit_blocksize
    packed = torch.empty(math.ceil(spec.numel / 2), 1, dtype=torch.uint8, device=device)
    absmax = torch.empty(math.ceil(spec.numel / block), dtype=torch.float32, device=device)
    rows_a_block = block // math.gcd(spec.shape[1], block)
    code = functional.get_4bit_type(quant_type, device=device)
    on_cpu = device.type == "cpu"
    for rows, part in row_slices(spec, weight, device, rows_a_block, check=not on_cpu):
        first, last = rows.start * spec.shape[1], rows.stop * spec.shape[1]
        largest = absmax[first // block : math.ceil(last / block)]
        _quantize_slice(part, quant_type, block, packed[first // 2 : math.ceil(last / 2), 0], largest)
        if on_cpu:
            check_slice(spec, rows, largest)  # of a block that is not finite, neither is the absmax
    offset, state2 = None, None
    if config.bnb_4bit_use_double_quant:
        offset = absmax.mean()
        centred, nested_code = absmax - offset, _nested_code(device)
        with _blockwise(device):
            absmax, state2 = functional.quantize_blockwise(centred, nested_code, blocksize=NESTED_BLOCK_SIZE)
    state = functional.QuantState(
        absmax=absmax,
        shape=torch.Size(spec.shape),
        dtype=spec.dtype,
        blocksize=block,
        code=code,
        quant_type=quant_type,
        offset=offset,
        state2=state2,
    )
    storage = storage_dtype(config, spec)
    parameter = library().nn.Params4bit(
        packed.view(-1).view(storage).unsqueeze(1),
        requires_grad=False,
        quant_state=state,
        blocksize=block,
        compress_statistics=config.bnb_4bit_use_double_quant,
        quant_type=quant_type,
        quant_storage=storage,
        bnb_quantized=True,
    )
    return safe_from_casts(parameter)


def storage_dtype(config: BitsAndBytesConfig, spec: WeightSpec) -> torch.dtype:
    """Return the dtype of packed bytes: the compute dtype, for networks that cast inputs to `layer.weight.dtype`.

    With uint8, upstream's default, such a network would cast its activations to bytes. Files always have uint8
    (`show_as_stored`), the only dtype that diffusers reads.
    """
    import torch

    is_default = config.bnb_4bit_quant_storage == "uint8"
    if is_default and math.ceil(spec.numel / 2) % spec.dtype.itemsize == 0:
        return spec.dtype
    return getattr(torch, config.bnb_4bit_quant_storage)


def show_as_stored(module: Any, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    """Convert a layer's packed weight to the dtype of files: a hook on its `state_dict`."""
    import torch

    weight, name = module._parameters["weight"], f"{prefix}weight"
    if name in state_dict and getattr(weight, "quant_state", None) is not None:
        state_dict[name] = state_dict[name].data.view(-1).view(torch.uint8).unsqueeze(1)


def create_8bit(spec: WeightSpec, weight: Tensor | Rows, device: torch.device) -> nn.Parameter:
    import torch

    from qexp.quantizers.bitsandbytes_support.parameters import int8_params

    half = WeightSpec(spec.module, spec.shape, torch.float16)  # the library quantizes from fp16 alone
    rows_of, on_cpu = RowAssembler(spec.shape[0]), device.type == "cpu"
    for rows, part in row_slices(spec if on_cpu else half, weight, device, check=not on_cpu):
        if on_cpu and are_ready():
            from qexp.quantizers.cpu_kernels.rowwise_8bit import llm_int8

            scale = llm_int8(part, rows_of.room("CB", rows, part.shape, torch.int8))
        else:
            values, scale = library().functional.int8_vectorwise_quant(part.half())[:2]
            rows_of.add(rows, {"CB": values})
        if on_cpu:
            check_slice(half, rows, scale)
        rows_of.add(rows, {"SCB": scale})
    values, scale = rows_of.inner["CB"], rows_of.inner["SCB"]
    return int8_params(values, scale, spec.dtype)


def _quantize_slice(part: Tensor, quant_type: str, blocksize: int, packed: Tensor, absmax: Tensor) -> None:
    """Quantize rows into `packed` and `absmax`: on a CPU by compiled loops, which make the library's bytes faster."""
    if part.device.type == "cpu" and are_ready():
        from qexp.quantizers.cpu_kernels.blockwise_4bit import quantize_4bit

        take_pages(packed.data_ptr(), packed.nbytes)
        quantize_4bit(part, _code_table(quant_type), blocksize, packed, absmax)
        return
    with _blockwise(part.device):
        bytes_, state = library().functional.quantize_4bit(part, blocksize=blocksize, quant_type=quant_type)
    packed.copy_(bytes_.view(-1))
    absmax.copy_(state.absmax)


@once
def _code_table(quant_type: str) -> Any:
    from qexp.quantizers.cpu_kernels.blockwise_4bit import code_table

    return code_table(library().functional.get_4bit_type(quant_type, device="cpu"))


@once
def _nested_code(device: torch.device) -> Tensor:
    """Return the library's code table on a device; the library copies it from the first device in every call."""
    return library().functional.create_dynamic_map().to(device)


@contextmanager
def _blockwise(device: torch.device) -> Iterator[None]:
    """Synchronize the library's quantization kernels with the current CUDA stream, before and after the block.

    They always run on the device's default stream (0.50.2;
    github.com/bitsandbytes-foundation/bitsandbytes/pull/2052).
    """
    import torch

    module: Any = None if device.type == "cpu" else torch.get_device_module(device)
    if not hasattr(module, "default_stream"):
        yield
        return
    default, current = module.default_stream(device), module.current_stream(device)
    default.wait_stream(current)
    try:
        yield
    finally:
        current.wait_stream(default)
