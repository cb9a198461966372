"""Tensors saved as GGUF files: gguf-py opens them, with the same bytes. (Models: `test_gguf_interchange.py`.)"""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qexp.checkpoints.gguf_header import read_gguf_header
from qexp.errors import ConfigError
from qexp.loading.gguf_saving import save_gguf
from qexp.quantizers.gguf import GGUFConfig, GGUFQuantizer
from qexp.quantizers.rows import WeightSpec
from tests.backends import CPU
from tests.quantizers.test_contract import gaussian


def quantized(weight: Tensor, quant_type: str = "Q8_0") -> nn.Parameter:
    spec = WeightSpec("x", (weight.shape[0], weight.shape[1]), weight.dtype)
    return GGUFQuantizer(GGUFConfig(quant_type=quant_type)).create_quantized_param(spec, [weight], {}, CPU)


def test_the_library_reads_what_was_saved(tmp_path: Path) -> None:
    weight, bias = quantized(gaussian(64, 96, dtype=torch.bfloat16), "Q5_0"), gaussian(64, dtype=torch.bfloat16)
    tensors: dict[str, Tensor] = {"a.weight": weight, "a.bias": nn.Parameter(bias), "half": gaussian(2, 3).half()}
    tensors |= {"turned": gaussian(3, 4).t(), "mask": torch.tensor([True, False]), "count": torch.tensor(7)}
    save_gguf(tmp_path / "x.gguf", tensors, architecture="x", metadata={"x.note": "n"})
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    read: dict[str, Any] = {tensor.name: tensor for tensor in reader.tensors}
    dense = gguf.quants.dequantize(read["a.weight"].data, read["a.weight"].tensor_type)
    assert np.array_equal(dense, weight.dequantize(torch.float32).numpy())
    kinds = {name: tensor.tensor_type.name for name, tensor in read.items()}
    assert kinds == {"a.weight": "Q5_0", "a.bias": "F32", "half": "F16", "turned": "F32", "mask": "I8", "count": "I64"}
    for name in ("a.bias", "half", "turned", "mask", "count"):
        assert np.array_equal(read[name].data, tensors[name].detach().float().numpy()), name


def test_what_was_saved_is_wrapped_again_with_the_same_bytes(tmp_path: Path) -> None:
    weight: Any = quantized(gaussian(64, 256), "TQ1_0")
    save_gguf(tmp_path / "x.gguf", {"w": weight}, architecture="x")
    (entry,) = read_gguf_header(tmp_path / "x.gguf").entries
    content = bytearray((tmp_path / "x.gguf").read_bytes()[entry.offset : entry.offset + entry.nbytes])
    raw = torch.frombuffer(content, dtype=torch.uint8)
    again: Any = GGUFQuantizer(GGUFConfig()).wrap(raw, entry.dtype.removeprefix("GGUF_"), entry.shape, torch.float32)
    assert again.quant_type == "TQ1_0"
    assert torch.equal(again.raw, weight.raw)


@pytest.mark.parametrize("tensor", [torch.zeros(2, dtype=torch.complex64), torch.zeros(2).to(torch.float8_e4m3fn)])
def test_what_gguf_cannot_hold_is_refused(tensor: Tensor, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'x' is a Tensor of torch\.(complex64|float8_e4m3fn).*safetensors"):
        save_gguf(tmp_path / "x.gguf", {"x": tensor}, architecture="x")
    assert not list(tmp_path.iterdir())


def test_other_quantized_weights_are_not_saved_by_their_bytes_alone(tmp_path: Path) -> None:
    class Other(nn.Parameter):
        """Such as a bitsandbytes one, whose scales are attributes."""

    with pytest.raises(ConfigError, match="'x' is a Other of"):
        save_gguf(tmp_path / "x.gguf", {"x": Other(torch.zeros(2))}, architecture="x")
