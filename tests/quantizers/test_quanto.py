"""optimum-quanto: the tensors that the library itself makes, without its compiled extension."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from qexp.offload.payload import leaves
from qexp.quantizers.base import WeightSpec, load_quantizer
from qexp.quantizers.quanto import QuantoConfig, _library, group_size, tinygemm_fits, unpack
from tests.backends import CPU
from tests.quantizers.test_contract import gaussian


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["int8", "int4", "int2", "float8"])
def test_weights_have_the_librarys_bytes(kind: str, dtype: torch.dtype) -> None:
    quanto = _library()
    for rows, columns in [(64, 256), (1, 512), (48, 96), (16, 100), (128, 384), (64, 128)]:
        if kind == "int4" and dtype == torch.bfloat16 and rows % 16:
            continue  # the library raises
        linear = nn.Linear(columns, rows, bias=False, dtype=dtype)
        linear.weight = nn.Parameter(gaussian(rows, columns, dtype=dtype), requires_grad=False)
        theirs = quanto.QLinear.from_module(linear, weights=getattr(quanto, f"q{kind}"))
        theirs.freeze()
        quantizer, spec = load_quantizer(QuantoConfig(weights_dtype=kind)), WeightSpec("x", (rows, columns), dtype)
        if quantizer.reason_to_skip(spec):
            continue
        with torch.no_grad():
            mine = quantizer.create_quantized_param(spec, [linear.weight], {}, CPU)
        expected = leaves(theirs.weight)
        assert type(mine.data) is type(theirs.weight.data)
        assert all(torch.equal(a, b) for a, b in zip(leaves(mine), expected, strict=True)), (rows, columns)


def test_a_layer_that_the_int4_kernel_refuses_is_kept_in_the_general_layout() -> None:
    quantizer, spec = load_quantizer(QuantoConfig(weights_dtype="int4")), WeightSpec("x", (40, 256), torch.bfloat16)
    weight = gaussian(40, 256, dtype=torch.bfloat16)
    with torch.no_grad():
        parameter = quantizer.create_quantized_param(spec, [weight], {}, CPU)
        restored = quantizer.dequantize_param(parameter, torch.bfloat16).float()
    assert (weight.float() - restored).norm() / weight.float().norm() < 0.12


@pytest.mark.parametrize("bits", [2, 4])
def test_unpack_reads_what_the_library_packs(bits: int) -> None:
    from optimum.quanto.tensor.packed import pack_weights

    values = torch.randint(0, 2**bits, (12, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(unpack(pack_weights(values, bits), bits)[:12], values)


def test_nothing_is_compiled() -> None:
    _library()
    from optimum.quanto.library.extensions.cpp import ext

    assert ext.lib.unpack is unpack


def test_group_size_is_the_librarys_rule() -> None:
    quanto = _library()
    for columns in (32, 64, 96, 100, 128, 160, 192, 256, 320, 384, 512, 1000, 3072):
        layer = quanto.QLinear(columns, 64, weights="qint4")
        assert group_size(columns) == layer.weight_group_size, columns


@pytest.mark.parametrize("moved", ["activations", "weights", "neither"])
def test_int8_products_survive_any_address(moved: str) -> None:
    """PyTorch's kernel ends the process when either starts off its alignment; run in a process of its own."""
    code = f"""
import torch
from qexp.quantizers.quanto import _library
_library()
def placed(tensor, offset):
    room = torch.empty(tensor.numel() + 64, dtype=tensor.dtype)[offset : offset + tensor.numel()]
    return room.view(tensor.shape).copy_(tensor)
torch.manual_seed(0)
x, w = torch.randn(5, 256).bfloat16(), torch.randint(-127, 127, (64, 256)).to(torch.int8)
scale = torch.rand(64, 1).bfloat16()
got = torch.ops.quanto.qbytes_mm(placed(x, {moved == "activations":d}), placed(w, 8 * {moved == "weights":d}), scale)
expected = x.float() @ (w.float() * scale.float()).T
assert (got.float() - expected).norm() / expected.norm() < 0.01
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_nothing_is_compiled_for_a_gpu_and_no_layout_chosen_that_would_need_it() -> None:
    """Where there is a GPU, the library's import registers an extension that it would have nvcc compile."""
    import importlib

    extension = importlib.import_module("optimum.quanto.library.extensions.cuda")
    registry = importlib.import_module("optimum.quanto.library.extensions.extension")
    if not registry.is_extension_available("quanto_cuda"):  # another test was here before
        registry.register_extension(extension.ext)
    _library.cache_clear()
    _library()
    assert extension.ext.lib.unpack is unpack
    assert not registry.is_extension_available("quanto_cuda")


@pytest.mark.parametrize(("device", "rows", "fits"), [("cpu", 16, True), ("cpu", 24, False), ("cuda", 24, True)])
def test_the_int4_kernel_takes_whole_tiles(device: str, rows: int, fits: bool) -> None:
    assert tinygemm_fits(rows, torch.device(device)) is fits
    assert not tinygemm_fits(rows + 1, torch.device(device))
