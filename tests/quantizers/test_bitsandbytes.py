"""bitsandbytes: the bytes that the library itself makes, whatever the machine."""

import subprocess
import sys

import pytest
import torch

from qexp.errors import ConfigError
from qexp.quantizers.base import WeightSpec, load_quantizer
from qexp.quantizers.bitsandbytes import BitsAndBytesConfig
from tests.backends import CPU, backend_config
from tests.quantizers.test_contract import gaussian, quantize, quantized_layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double quant"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_4bit_has_the_librarys_bytes(quant_type: str, double_quant: bool, dtype: torch.dtype) -> None:
    import bitsandbytes.functional as functional

    weight = gaussian(130, 200, dtype=dtype)  # blocks that straddle rows, and a last one that is not full
    fields = (f"bnb_4bit_quant_type={quant_type}", f"bnb_4bit_use_double_quant={double_quant}")
    quantizer = load_quantizer(backend_config("bitsandbytes", *fields))
    parameter = quantizer.create_quantized_param(WeightSpec("x", (130, 200), dtype), [weight], {}, CPU)
    expected, state = functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=double_quant, quant_type=quant_type
    )
    mine = parameter.quant_state
    assert torch.equal(parameter.data, expected)
    assert torch.equal(mine.absmax, state.absmax)
    assert mine.as_dict().keys() == state.as_dict().keys()
    assert (mine.shape, mine.dtype, mine.blocksize, mine.quant_type) == (weight.shape, dtype, 64, quant_type)
    if double_quant:
        assert torch.equal(mine.offset, state.offset)
        assert torch.equal(mine.state2.absmax, state.state2.absmax)
    assert torch.equal(quantizer.dequantize_param(parameter, dtype), functional.dequantize_4bit(expected, state))


def test_8bit_has_the_librarys_bytes() -> None:
    import bitsandbytes.functional as functional

    weight = gaussian(130, 200, dtype=torch.bfloat16)
    _, parameter = quantize("bitsandbytes_int8", weight)
    values, scales, _ = functional.int8_vectorwise_quant(weight.half())
    assert torch.equal(parameter.data, values)
    assert torch.equal(parameter.SCB, scales)


def test_the_threshold_keeps_outliers_in_16_bits() -> None:
    """Source: arXiv:2208.07339, section 3: with outliers in the input, int8 alone loses them."""
    weight, x = gaussian(256, 512), gaussian(8, 512, seed=1)
    x[:, 7] *= 60
    errors = {}
    for threshold in (0.0, 6.0):
        config = backend_config("bitsandbytes_int8", f"llm_int8_threshold={threshold}")
        _, model = quantized_layer("bitsandbytes_int8", weight, None)
        model["layer"].state.threshold = load_quantizer(config).config.llm_int8_threshold
        with torch.no_grad():
            errors[threshold] = ((model["layer"](x) - x @ weight.T).norm() / (x @ weight.T).norm()).item()
    assert errors[6.0] < errors[0.0] / 2


def test_the_weight_is_not_repacked_on_cpus_that_the_library_repacks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes.nn.modules as modules

    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    _, model = quantized_layer("bitsandbytes", gaussian(64, 128, dtype=torch.bfloat16), None)
    before = model["layer"].weight.data.clone()
    with torch.no_grad():
        model["layer"](gaussian(3, 128, dtype=torch.bfloat16))
    assert torch.equal(model["layer"].weight.data, before)
    assert not getattr(model["layer"].weight.quant_state, "packing_format_for_cpu", False)


def test_the_import_asks_no_hub_for_kernels() -> None:
    code = """
import sys, types
trap = types.ModuleType("kernels")
trap.get_kernel = lambda *arguments, **options: sys.exit("the library asked a hub for a kernel")
sys.modules["kernels"] = trap
from qexp.quantizers.bitsandbytes import _library
_library()
assert sys.modules["kernels"] is trap
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_fields_are_checked() -> None:
    with pytest.raises(ConfigError, match="both true"):
        BitsAndBytesConfig(load_in_4bit=True, load_in_8bit=True)
    with pytest.raises(ConfigError, match="bnb_4bit_quant_type='nf5' is unknown; use fp4 or nf4"):
        BitsAndBytesConfig(bnb_4bit_quant_type="nf5")
    with pytest.raises(ConfigError, match="llm_int8_threshold=-1"):
        BitsAndBytesConfig(llm_int8_threshold=-1)
    with pytest.raises(ConfigError, match="both false, so nothing would be quantized"):
        load_quantizer(BitsAndBytesConfig()).validate_environment(CPU)
