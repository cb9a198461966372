"""Stored bitsandbytes weights that do not fit or are damaged: each is refused by what is wrong with it."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qexp.checkpoints.tensor_entry import TensorEntry
from qexp.errors import LoadError
from qexp.quantizers.base import load_quantizer
from qexp.quantizers.bitsandbytes_support import stored
from qexp.quantizers.rows import WeightSpec
from tests.backends import CPU, backend_config
from tests.quantizers.test_contract import gaussian, quantize

SPEC = WeightSpec("blocks.3", (64, 128), torch.float32)


def companions(backend: str) -> tuple[Tensor, dict[str, Tensor]]:
    """(packed weight, what is stored beside it) of a quantized weight."""
    _, parameter = quantize(backend, gaussian(*SPEC.shape))
    quantized: Any = parameter
    return quantized.data, quantized.quant_state.as_dict(packed=True)


def described(values: dict[str, Any]) -> Tensor:
    return torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)


def entry(shape: tuple[int, ...], dtype: str, size: int) -> TensorEntry:
    return TensorEntry("x", dtype, shape, Path("x.safetensors"), 0, size * math.prod(shape))


@pytest.mark.parametrize("backend", ["bitsandbytes", "bitsandbytes_fp4", "bitsandbytes_nf4_dq"])
def test_a_whole_weight_is_put_together_again(backend: str) -> None:
    packed, parts = companions(backend)
    quantizer, parameter = (
        load_quantizer(backend_config(backend)),
        stored.assemble_4bit(SPEC, packed, parts, CPU, torch.uint8),
    )
    expected = quantizer.dequantize_param(quantize(backend, gaussian(*SPEC.shape))[1], torch.float32)
    assert torch.equal(quantizer.dequantize_param(parameter, torch.float32), expected)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"shape": [64, 64]}, r"shape \[64, 64\]"),
        ({"shape": None}, "cannot be read"),
        ({"quant_type": "fp4"}, "quant_type fp4"),
        ({"blocksize": 48}, "blocksize 48"),
        ({"blocksize": 128}, r"absmax of shape \[128\]"),
        ({"dtype": "int8"}, "dtype int8"),
        ({"nested_blocksize": 0}, "nested_blocksize"),
        ({"nested_blocksize": 64}, r"nested_absmax of shape \[1\]"),
        ({"nested_offset": float("nan")}, "nested_offset nan"),
        ({"nested_offset": "much"}, "cannot be read"),
    ],
    ids=str,
)
def test_a_quant_state_that_does_not_describe_the_weight_is_refused(changes: dict[str, Any], what: str) -> None:
    packed, parts = companions("bitsandbytes_nf4_dq")
    name = "quant_state.bitsandbytes__nf4"
    parts[name] = described(json.loads(bytes(parts[name].tolist())) | changes)
    with pytest.raises(LoadError, match=f"'blocks.3' cannot be used: .*{what}"):
        stored.assemble_4bit(SPEC, packed, parts, CPU, torch.uint8)


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"\xff\xfe", b"null", b'{"shape": [64, 128]}'])
def test_a_quant_state_that_is_no_json_is_refused(text: bytes) -> None:
    packed, parts = companions("bitsandbytes")
    parts["quant_state.bitsandbytes__nf4"] = torch.tensor(list(text), dtype=torch.uint8)
    with pytest.raises(LoadError, match="its quant state cannot be read"):
        stored.assemble_4bit(SPEC, packed, parts, CPU, torch.uint8)


@pytest.mark.parametrize("part", ["absmax", "quant_map"])
def test_a_part_of_another_length_is_refused(part: str) -> None:
    packed, parts = companions("bitsandbytes")
    parts[part] = parts[part][:-1]
    with pytest.raises(LoadError, match=rf"its quant state has {part} of shape \[{len(parts[part])}\]"):
        stored.assemble_4bit(SPEC, packed, parts, CPU, torch.uint8)


def test_headers_that_do_not_fit_are_refused_before_anything_is_read() -> None:
    whole = {
        "weight": entry((4096, 1), "U8", 1),
        "absmax": entry((128,), "F32", 4),
        "quant_map": entry((16,), "F32", 4),
    }
    stored.check_4bit(SPEC, whole, "uint8")
    with pytest.raises(LoadError, match="lacks 'absmax'"):
        stored.check_4bit(SPEC, {name: part for name, part in whole.items() if name != "absmax"}, "uint8")
    with pytest.raises(LoadError, match="lacks 'nested_quant_map'"):
        stored.check_4bit(SPEC, whole | {"nested_absmax": entry((1,), "F32", 4)}, "uint8")
    with pytest.raises(LoadError, match=r"not the weight of .* 4 bits of bitsandbytes"):
        stored.check_4bit(SPEC, whole | {"weight": entry((4096, 1), "F32", 4)}, "uint8")
    with pytest.raises(LoadError, match=r"not the weight of .* 4 bits of bitsandbytes"):
        stored.check_4bit(SPEC, whole, "float16")
    rows = {"weight": entry((64, 128), "I8", 1), "SCB": entry((64,), "F32", 4)}
    stored.check_8bit(SPEC, rows)
    with pytest.raises(LoadError, match=r"not the weight of .* 8 bits of bitsandbytes"):
        stored.check_8bit(SPEC, rows | {"weight": entry((64, 128), "F16", 2)})
    with pytest.raises(LoadError, match=r"is F32 \[128\] .* not the SCB of"):
        stored.check_8bit(SPEC, rows | {"SCB": entry((128,), "F32", 4)})


def test_8bit_weights_in_the_order_of_old_gpus_are_refused() -> None:
    parts = {"SCB": torch.ones(64), "weight_format": torch.tensor(2, dtype=torch.uint8)}
    with pytest.raises(LoadError, match=r"weight_format=2 is not rows in order \(0\)"):
        stored.assemble_8bit(SPEC, torch.zeros(64, 128, dtype=torch.int8), parts, CPU)
