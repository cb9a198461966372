"""What every backend that quantizes must do, whichever library does it."""

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qexp.errors import ConfigError, MissingLibraryError
from qexp.offloading.payload import leaves, true_nbytes
from qexp.quantizers import base
from qexp.quantizers.base import load_quantizer
from qexp.quantizers.rows import SLICE_WEIGHTS, WeightSpec
from tests.backends import CPU, EVERY_WAY_TO_QUANTIZE, QUANTIZING, backend_config, can_hold, same_bytes
from tests.products import diagonal

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# relative error of one layer's output on N(0, 1) weights and inputs: twice what the formats' SQNR leads one to expect
FORWARD_ERROR = {"2": 1.1, "3": 0.4, "4": 0.25, "8": 0.12}


def gaussian(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def quantize(backend: str, weight: Tensor, name: str = "layer") -> tuple[base.Quantizer, nn.Parameter]:
    quantizer = load_quantizer(backend_config(backend))
    quantizer.validate_environment(CPU)
    spec = WeightSpec(name, (weight.shape[0], weight.shape[1]), weight.dtype)
    with torch.no_grad():
        return quantizer, quantizer.create_quantized_param(spec, [weight], {}, CPU)


def quantized_layer(backend: str, weight: Tensor, bias: Tensor | None) -> tuple[base.Quantizer, nn.Module]:
    """A model with one layer, quantized as a load would do it."""
    quantizer, parameter = quantize(backend, weight)
    rows, columns = weight.shape
    with torch.device("meta"):
        model = nn.ModuleDict({"layer": nn.Linear(columns, rows, bias=bias is not None, dtype=weight.dtype)})
    quantizer.preprocess_model(model.eval().requires_grad_(False), ["layer"], weight.dtype)
    layer: Any = model["layer"]
    layer.weight = parameter
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    quantizer.postprocess_model(model, CPU)
    model._pre_quantization_dtype = weight.dtype  # type: ignore[assignment]
    return quantizer, model


def bits(backend: str) -> str:
    low = re.search(r"(?:int|packed_fp)([234])", backend)
    return low[1] if low else "4" if getattr(backend_config(backend), "load_in_4bit", False) else "8"


@pytest.mark.parametrize(("backend", "dtype"), diagonal(QUANTIZING, DTYPES), ids=str)
def test_bytes_are_as_predicted(backend: str, dtype: torch.dtype) -> None:
    for rows, columns in [(256, 512), (48, 96), (100, 320), (17, 64), (2, 4096)]:
        spec = WeightSpec("layer", (rows, columns), dtype)
        if columns % 64 and not can_hold(load_quantizer(backend_config(backend)), spec):
            continue
        quantizer, parameter = quantize(backend, gaussian(rows, columns, dtype=dtype))
        assert true_nbytes(parameter) == quantizer.quantized_nbytes(spec), (rows, columns)
        assert not parameter.requires_grad
        assert not parameter.is_meta


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", EVERY_WAY_TO_QUANTIZE)
def test_slices_give_the_same_bytes_as_the_whole(
    backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rows, columns in [(300, 256), (129, 192), (65, 320)]:
        weight = gaussian(rows, columns, dtype=dtype)
        monkeypatch.setitem(SLICE_WEIGHTS, "cpu", 1 << 30)
        whole = leaves(quantize(backend, weight)[1])
        monkeypatch.setitem(SLICE_WEIGHTS, "cpu", 5000)
        sliced = leaves(quantize(backend, weight)[1])
        assert len(whole) == len(sliced)
        assert all(same_bytes(a, b) for a, b in zip(whole, sliced, strict=True)), (rows, columns)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", EVERY_WAY_TO_QUANTIZE)
def test_a_layer_computes_with_its_weights(backend: str, dtype: torch.dtype, bias: bool) -> None:
    weight, x = gaussian(256, 512, dtype=dtype), gaussian(8, 512, dtype=dtype, seed=1)
    offset = gaussian(256, dtype=dtype, seed=2) if bias else None
    quantizer, model = quantized_layer(backend, weight, offset)
    assert quantizer.is_quantized(model["layer"])
    with torch.no_grad():
        output = model["layer"](x).float()
    dense = nn.functional.linear(x.float(), weight.float(), None if offset is None else offset.float())
    assert (output - dense).norm() / dense.norm() < FORWARD_ERROR[bits(backend)]
    restored = quantizer.dequantize(model)["layer"]
    assert type(restored) is nn.Linear
    assert restored.weight.dtype == dtype
    with torch.no_grad():
        assert (output - restored(x).float()).norm() / dense.norm() < 0.03  # what quantized activations cost


@pytest.mark.parametrize("backend", EVERY_WAY_TO_QUANTIZE)
def test_running_changes_no_byte(backend: str) -> None:
    _, model = quantized_layer(backend, gaussian(64, 128, dtype=torch.bfloat16), None)
    before = [leaf.clone() for leaf in leaves(model["layer"].weight)]
    size = true_nbytes(*(leaf for leaf in before))
    with torch.no_grad():
        first = model["layer"](gaussian(3, 128, dtype=torch.bfloat16, seed=1))
        second = model["layer"](gaussian(3, 128, dtype=torch.bfloat16, seed=1))
    assert torch.equal(first, second)
    after = leaves(model["layer"].weight)
    assert all(same_bytes(a, b) for a, b in zip(before, after, strict=False))
    assert true_nbytes(*after) <= size  # LLM.int8 hands its scales to the module


@pytest.mark.parametrize("backend", EVERY_WAY_TO_QUANTIZE)
def test_dequantize_works_after_a_forward_and_on_a_copy(backend: str) -> None:
    weight = gaussian(64, 128)
    quantizer, model = quantized_layer(backend, weight, gaussian(64, seed=2))
    with torch.no_grad():
        model["layer"](gaussian(2, 128, seed=1))
    expected = quantizer.dequantize_param(quantize(backend, weight)[1], torch.float32)
    copies = [] if "quanto" in backend else [copy.deepcopy(model)]  # upstream's frozen modules cannot be copied
    for one in [*copies, model]:
        assert torch.equal(quantizer.dequantize(one)["layer"].weight, expected)
        assert not quantizer.is_quantized(one["layer"])


@pytest.mark.parametrize("backend", QUANTIZING)
def test_rows_of_zeros_stay_zero(backend: str) -> None:
    """As of a layer that starts as zero (adaLN-Zero); the libraries' float8 makes them NaN."""
    weight = gaussian(32, 128)
    weight[5:9] = 0
    for one in (weight, torch.zeros(32, 128)):
        quantizer, parameter = quantize(backend, one)
        restored = quantizer.dequantize_param(parameter, torch.float32)
        assert restored.isfinite().all()
        assert torch.equal(restored[5:9], torch.zeros(4, 128))


@pytest.mark.parametrize("backend", QUANTIZING)
def test_a_missing_or_old_library_is_named_with_its_remedy(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer = load_quantizer(backend_config(backend))
    package = next(iter(quantizer.required_packages), "numpy")  # a backend may need none
    monkeypatch.setattr(type(quantizer), "required_packages", {package: "99.0"})
    with pytest.raises(MissingLibraryError, match=f"pip install '{package}>=99.0'"):
        quantizer.validate_environment(CPU)
    monkeypatch.setattr(type(quantizer), "required_packages", {"no-such-package": "1.0"})
    with pytest.raises(MissingLibraryError, match="found none"):
        quantizer.validate_environment(CPU)


def test_a_group_that_does_not_divide_is_refused_with_those_that_do() -> None:
    quantizer = load_quantizer(backend_config("torchao", "group_size=48"))
    with pytest.raises(ConfigError, match=r"group_size=48 does not divide in_features=128 of 'a\.b'; use .*32.*64"):
        quantizer.reason_to_skip(WeightSpec("a.b", (64, 128), torch.float32))


def test_a_group_that_divides_has_a_scale_a_group() -> None:
    quantizer = load_quantizer(backend_config("torchao", "group_size=32"))
    weight, spec = gaussian(64, 128), WeightSpec("a.b", (64, 128), torch.float32)
    assert quantizer.reason_to_skip(spec) is None
    parameter = quantizer.create_quantized_param(spec, [weight], {}, CPU)
    assert true_nbytes(parameter) == quantizer.quantized_nbytes(spec) == 64 * 128 + 64 * 4 * (4 + 1)
    fine = (weight - quantizer.dequantize_param(parameter, torch.float32)).norm()
    coarse_quantizer, coarse_parameter = quantize("torchao", weight)
    assert fine < (weight - coarse_quantizer.dequantize_param(coarse_parameter, torch.float32)).norm()
