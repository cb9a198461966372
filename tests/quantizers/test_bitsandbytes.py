"""bitsandbytes: the bytes that the library itself makes, whatever the machine."""

from pathlib import Path
from typing import Any

import pytest
import torch

from qexp.config.backend_options import backend_of
from qexp.config.offload import OffloadConfig
from qexp.config.schema import ComponentConfig, LoaderConfig
from qexp.errors import ConfigError
from qexp.loading.lifecycle import load_component
from qexp.loading.saving import save_model
from qexp.offloading.payload import true_nbytes
from qexp.offloading.strategies import apply_offload
from qexp.quantizers.base import load_quantizer
from qexp.quantizers.bitsandbytes_support.config import QUANT_STORAGES, BitsAndBytesConfig
from qexp.quantizers.bitsandbytes_support.library import library
from qexp.quantizers.bitsandbytes_support.stored import BLOCK_SIZES
from qexp.quantizers.rows import SLICE_WEIGHTS, WeightSpec
from tests.backends import CPU, StackSource, backend_config, save_stack
from tests.products import diagonal, representatives
from tests.quantizers.formulas import blockwise_code, fp4_code, nf4_code
from tests.quantizers.test_contract import gaussian, quantize, quantized_layer


def nf4(**fields: Any) -> Any:
    """The config of backend=bitsandbytes with fields named without their `bnb_4bit_`."""
    return backend_of("bitsandbytes", {f"bnb_4bit_{name}": value for name, value in fields.items()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double quant"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_4bit_has_the_librarys_bytes(quant_type: str, double_quant: bool, dtype: torch.dtype) -> None:
    assert_4bit_as_the_library(dtype, quant_type, double_quant)


@pytest.mark.parametrize(
    ("blocksize", "double_quant"), diagonal([size for size in BLOCK_SIZES if size != 64], [False, True])
)
def test_every_block_size_has_the_librarys_bytes(
    blocksize: int, double_quant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SLICE_WEIGHTS, "cpu", 5000)  # slices of the fewest rows whose end is a block's
    assert_4bit_as_the_library(torch.bfloat16, "nf4", double_quant, blocksize=blocksize)


@pytest.mark.parametrize("storage", QUANT_STORAGES)
def test_every_quant_storage_has_the_librarys_bytes(storage: str) -> None:
    assert_4bit_as_the_library(torch.float32, "nf4", False, storage=storage)


def assert_4bit_as_the_library(
    dtype: torch.dtype, quant_type: str, double_quant: bool, blocksize: int = 64, storage: str = "uint8"
) -> None:
    import bitsandbytes.functional as functional

    weight = gaussian(130, 200, dtype=dtype)  # blocks that straddle rows, and a last one that is not full
    fields = {"quant_type": quant_type, "use_double_quant": double_quant, "blocksize": blocksize}
    quantizer, spec = load_quantizer(nf4(quant_storage=storage, **fields)), WeightSpec("x", (130, 200), dtype)
    parameter: Any = quantizer.create_quantized_param(spec, [weight], {}, CPU)
    expected, state = functional.quantize_4bit(
        weight,
        blocksize=blocksize,
        compress_statistics=double_quant,
        quant_type=quant_type,
        quant_storage=getattr(torch, storage),
    )
    assert true_nbytes(parameter) == quantizer.quantized_nbytes(spec)
    assert parameter.dtype == (dtype if storage == "uint8" else expected.dtype)  # what networks see
    mine = parameter.quant_state
    assert torch.equal(parameter.data.view(-1).view(torch.uint8), expected.view(-1).view(torch.uint8))
    assert torch.equal(mine.absmax, state.absmax)
    assert mine.as_dict().keys() == state.as_dict().keys()
    assert (mine.shape, mine.dtype, mine.blocksize, mine.quant_type) == (weight.shape, dtype, blocksize, quant_type)
    if double_quant:
        assert torch.equal(mine.offset, state.offset)
        assert torch.equal(mine.state2.absmax, state.state2.absmax)
    assert torch.equal(quantizer.dequantize_param(parameter, dtype), functional.dequantize_4bit(expected, state))


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double quant"])
@pytest.mark.parametrize(
    ("shape", "blocksize"),
    [
        ((32, 32), 64),
        ((64, 16), 64),
        ((48, 1120), 64),
        ((40, 96), 128),
        ((10, 64), 256),
        ((37, 42), 64),
        ((5, 130), 32),
    ],
    ids=str,
)
@pytest.mark.parametrize("quant_type", representatives(["nf4", "fp4"], ["nf4"]))
def test_blocks_that_straddle_rows_are_decoded_as_they_were_made(
    quant_type: str, shape: tuple[int, int], blocksize: int, double_quant: bool
) -> None:
    """The library's own kernel for CPUs begins a block with each row: errors of 0.2 to 0.4 where 4 bits make 0.1."""
    fields = {"quant_type": quant_type, "use_double_quant": double_quant, "blocksize": blocksize}
    quantizer, weight = load_quantizer(nf4(**fields)), gaussian(*shape)
    parameter: Any = quantizer.create_quantized_param(WeightSpec("x", shape, torch.float32), [weight], {}, CPU)
    expected = coded(weight, nf4_code() if quant_type == "nf4" else fp4_code(), blocksize)
    decoded = quantizer.dequantize_param(parameter, torch.float32)
    columns = library().matmul_4bit(torch.eye(shape[1]), parameter.data, parameter.quant_state)
    one_row = library().matmul_4bit(torch.ones(1, shape[1]), parameter.data, parameter.quant_state)
    tolerance = 0.05 if double_quant else 1e-5
    torch.testing.assert_close(decoded, expected, atol=tolerance, rtol=tolerance)
    assert torch.equal(columns.T, decoded)
    torch.testing.assert_close(one_row[0], decoded.sum(dim=1), atol=1e-4, rtol=1e-4)


def coded(weight: torch.Tensor, code: Any, block: int) -> torch.Tensor:
    """The formula in numpy; the last block may be filled up."""
    padded = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % block))
    return torch.from_numpy(blockwise_code(padded.numpy(), code, block)).float()[: weight.numel()].view(weight.shape)


def test_nothing_is_compiled_for_large_blocks() -> None:
    """The library would, on CPUs with AVX512, for every shape."""
    from torch._dynamo.utils import counters

    quantizer = load_quantizer(nf4(blocksize=4096))
    weight, spec, before = gaussian(62, 130), WeightSpec("x", (62, 130), torch.float32), counters["stats"].copy()
    parameter = quantizer.create_quantized_param(spec, [weight], {}, CPU)
    restored = quantizer.dequantize_param(parameter, torch.float32)
    assert (restored - weight).norm() / weight.norm() < 0.2
    assert counters["stats"] == before


def test_8bit_has_the_librarys_bytes() -> None:
    import bitsandbytes.functional as functional

    weight = gaussian(130, 200, dtype=torch.bfloat16)
    _, parameter = quantize("bitsandbytes_int8", weight)
    values, scales, _ = functional.int8_vectorwise_quant(weight.half())
    assert torch.equal(parameter.data, values)
    assert torch.equal(parameter.SCB, scales)


@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 3, 64), (2, 3, 5, 64), (2, 1, 3, 2, 64), (0, 3, 2, 64)], ids=str)
@pytest.mark.parametrize("bias", [None, gaussian(24)], ids=["without bias", "with bias"])
@pytest.mark.parametrize("backend", ["bitsandbytes_int8", "bitsandbytes"])
def test_inputs_have_any_number_of_dimensions(backend: str, bias: torch.Tensor | None, shape: tuple[int, ...]) -> None:
    """As for nn.Linear. Eight-bit rows of activations are quantized one by one, whatever they are arranged in."""
    model: Any = quantized_layer(backend, gaussian(24, 64), bias)[1]
    x = gaussian(*shape)
    rows = [model["layer"](row[None])[0] for row in x.reshape(-1, 64)]
    expected = torch.stack(rows).reshape(*shape[:-1], 24) if rows else torch.empty(*shape[:-1], 24)
    torch.testing.assert_close(model["layer"](x), expected, rtol=1e-3, atol=1e-3)


def test_the_threshold_keeps_outliers_in_16_bits() -> None:
    """Source: arXiv:2208.07339, section 3: with outliers in the input, int8 alone loses them."""
    weight, x = gaussian(256, 512), gaussian(8, 512, seed=1)
    x[:, 7] *= 60
    errors = {}
    for threshold in (0.0, 6.0):
        config = backend_of("bitsandbytes_int8", {"llm_int8_threshold": threshold})
        _, model = quantized_layer("bitsandbytes_int8", weight, None)
        model["layer"].state.threshold = load_quantizer(config).config.llm_int8_threshold
        with torch.no_grad():
            errors[threshold] = ((model["layer"](x) - x @ weight.T).norm() / (x @ weight.T).norm()).item()
    assert errors[6.0] < errors[0.0] / 2


@pytest.fixture
def repacking_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine for which the library repacks 4-bit weights in place on their first forward."""
    import bitsandbytes.nn.modules as modules

    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)


@pytest.mark.usefixtures("repacking_cpu")
@pytest.mark.parametrize("backend", ["bitsandbytes", "bitsandbytes_nf4_dq"])
def test_no_cpu_changes_what_a_weight_is_saved_or_offloaded_as(backend: str, tmp_path: Path) -> None:
    dense, x = save_stack(tmp_path / "dense", [(128, 64), (96, 128)], dtype=torch.bfloat16), gaussian(3, 64)
    model, x = load_stack(tmp_path / "dense", backend), x.to(torch.bfloat16)
    save_model(model, tmp_path / "before")
    with torch.no_grad():
        first = model(x)
        assert (first.float() - dense(x).float()).norm() / dense(x).float().norm() < 0.2
        assert torch.equal(model(x), first)
        save_model(model, tmp_path / "after")
        for strategy in ("leaf", "block"):
            reloaded = load_stack(tmp_path / ("before" if strategy == "leaf" else "after"), backend)
            assert torch.equal(reloaded(x), first)
            settings = OffloadConfig(strategy=strategy, to="disk").resolved("cpu")
            offload = apply_offload(reloaded, settings, device=CPU, block_lists=("layers",), store=tmp_path / strategy)
            assert torch.equal(reloaded(x), first)
            assert offload.statistics()["offload/copies"] > 0
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()


def load_stack(folder: Path, backend: str) -> Any:
    source, settings = StackSource(folder), ComponentConfig(backend_config(backend))
    return load_component(source, "stack", settings, device=CPU, loader=LoaderConfig()).model


def test_fields_are_checked() -> None:
    with pytest.raises(ConfigError, match="both true"):
        BitsAndBytesConfig(load_in_4bit=True, load_in_8bit=True)
    with pytest.raises(ConfigError, match="bnb_4bit_quant_type='nf5' is unknown; use fp4 or nf4"):
        BitsAndBytesConfig(bnb_4bit_quant_type="nf5")
    with pytest.raises(ConfigError, match="llm_int8_threshold=-1"):
        BitsAndBytesConfig(llm_int8_threshold=-1)
    with pytest.raises(ConfigError, match="bnb_4bit_blocksize=48 is not supported by bitsandbytes; use 32, 64, 128"):
        BitsAndBytesConfig(bnb_4bit_blocksize=48)
    with pytest.raises(ConfigError, match="bnb_4bit_quant_storage='int16' is unknown"):
        BitsAndBytesConfig(bnb_4bit_quant_storage="int16")
    with pytest.raises(ConfigError, match="llm_int8_has_fp16_weight=true keeps every weight in 16 bits"):
        load_quantizer(BitsAndBytesConfig(load_in_8bit=True, llm_int8_has_fp16_weight=True)).validate_environment(CPU)
    with pytest.raises(ConfigError, match="both false, so nothing would be quantized"):
        load_quantizer(BitsAndBytesConfig()).validate_environment(CPU)
