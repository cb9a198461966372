"""optimum-quanto: the tensors that the library itself makes, without its compiled extension."""

from pathlib import Path

import pytest
import torch
from torch import nn

from qexp.checkpoints.tensor_entry import TensorEntry
from qexp.errors import ConfigError, LoadError
from qexp.offloading.payload import leaves
from qexp.quantizers.base import load_quantizer
from qexp.quantizers.quanto import QuantoConfig, group_size, tinygemm_fits
from qexp.quantizers.quanto_support.library import library, unpack
from qexp.quantizers.rows import WeightSpec
from tests.backends import CPU
from tests.fresh_process import run_python
from tests.products import representatives
from tests.quantizers.test_contract import gaussian


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["int8", "int4", "int2", "float8", "float8_e4m3fn", "float8_e5m2"])
def test_weights_have_the_librarys_bytes(kind: str, dtype: torch.dtype) -> None:
    quanto = library()
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


@pytest.mark.exhaustive
def test_nothing_is_compiled_and_nothing_is_written_beside_the_library() -> None:
    """The library compiles an extension into its own folder with the first packed weight that it unpacks."""
    run_python("""
import sys
from pathlib import Path
import torch
from qexp.quantizers.rows import WeightSpec
from qexp.quantizers.base import load_quantizer
from qexp.quantizers.quanto import QuantoConfig
from qexp.quantizers.quanto_support.library import library

def files():
    folder = Path(library().__file__).parent
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if "__pycache__" not in path.parts}

def compiler(*arguments, **options):
    sys.exit("an extension was compiled")

import torch.utils.cpp_extension
torch.utils.cpp_extension.load = compiler
before, cpu = files(), torch.device("cpu")
for kind in ("int2", "int4"):
    for dtype in (torch.float32, torch.bfloat16):
        quantizer, spec = load_quantizer(QuantoConfig(weights_dtype=kind)), WeightSpec("x", (40, 256), dtype)
        with torch.no_grad():
            weight = quantizer.create_quantized_param(spec, [torch.randn(40, 256)], {}, cpu)
            quantizer.dequantize_param(weight, dtype)
            torch.nn.functional.linear(torch.randn(3, 256, dtype=dtype), weight)
assert files() == before
""")


def test_group_size_is_the_librarys_rule() -> None:
    quanto = library()
    for columns in (32, 64, 96, 100, 128, 160, 192, 256, 320, 384, 512, 1000, 3072):
        layer = quanto.QLinear(columns, 64, weights="qint4")
        assert group_size(columns) == layer.weight_group_size, columns


@pytest.mark.parametrize("moved", representatives(["activations", "weights", "neither"], ["activations"]))
def test_int8_products_survive_any_address(moved: str) -> None:
    """PyTorch's kernel ends the process when either starts off its alignment; run in a process of its own."""
    run_python(f"""
import torch
from qexp.quantizers.quanto_support.library import library
library()
def placed(tensor, offset):
    room = torch.empty(tensor.numel() + 64, dtype=tensor.dtype)[offset : offset + tensor.numel()]
    return room.view(tensor.shape).copy_(tensor)
torch.manual_seed(0)
x, w = torch.randn(5, 256).bfloat16(), torch.randint(-127, 127, (64, 256)).to(torch.int8)
scale = torch.rand(64, 1).bfloat16()
got = torch.ops.quanto.qbytes_mm(placed(x, {moved == "activations":d}), placed(w, 8 * {moved == "weights":d}), scale)
expected = x.float() @ (w.float() * scale.float()).T
assert (got.float() - expected).norm() / expected.norm() < 0.01
""")


def test_fields_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"weights_dtype='int3' is unknown; use float8, .* int4 or int8"):
        QuantoConfig(weights_dtype="int3")


def test_float8_is_stored_by_the_name_that_diffusers_knows() -> None:
    assert QuantoConfig(weights_dtype="float8_e4m3fn").to_dict()["weights_dtype"] == "float8"
    assert QuantoConfig(weights_dtype="float8_e5m2").to_dict()["weights_dtype"] == "float8_e5m2"


@pytest.mark.parametrize(("stored", "read"), [("float8_e5m2", "float8"), ("float8", "float8_e5m2"), ("int8", "float8")])
def test_bytes_of_another_format_are_refused(stored: str, read: str) -> None:
    """All of these have a byte a weight, and scales of one shape."""
    kinds = {"float8_e5m2": "F8_E5M2", "float8": "F8_E4M3", "int8": "I8"}
    file, spec = Path("x.safetensors"), WeightSpec("x", (64, 128), torch.float32)
    data = TensorEntry("x.weight._data", kinds[stored], (64, 128), file, 0, 64 * 128)
    parts = {"_data": data, "_scale": TensorEntry("x.weight._scale", "F32", (64, 1), file, 0, 256)}
    load_quantizer(QuantoConfig(weights_dtype=stored)).check_quantized_param_shape(spec, parts)
    with pytest.raises(LoadError, match=f"is {kinds[stored]} .* not the _data of .* quanto's {read}"):
        load_quantizer(QuantoConfig(weights_dtype=read)).check_quantized_param_shape(spec, parts)


def test_nothing_is_compiled_for_a_gpu_and_no_layout_chosen_that_would_need_it() -> None:
    """Where there is a GPU, the library's import registers an extension that it would have nvcc compile."""
    import importlib

    extension = importlib.import_module("optimum.quanto.library.extensions.cuda")
    registry = importlib.import_module("optimum.quanto.library.extensions.extension")
    if not registry.is_extension_available("quanto_cuda"):  # another test was here before
        registry.register_extension(extension.ext)
    library.__wrapped__()
    assert extension.ext.lib.unpack is unpack
    assert not registry.is_extension_available("quanto_cuda")


@pytest.mark.parametrize(("device", "rows", "fits"), [("cpu", 16, True), ("cpu", 24, False), ("cuda", 24, True)])
def test_the_int4_kernel_takes_whole_tiles(device: str, rows: int, fits: bool) -> None:
    assert tinygemm_fits(rows, torch.device(device)) is fits
    assert not tinygemm_fits(rows + 1, torch.device(device))
