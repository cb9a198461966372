"""Tensors saved as GGUF files: gguf-py opens them, with the same bytes. (Models: `test_gguf_interchange.py`.)"""

import errno
import os
import weakref
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qexp.checkpoints.gguf_header import read_gguf_header
from qexp.errors import ConfigError, DiskError
from qexp.loading.gguf_saving import save_gguf
from qexp.quantizers.gguf import GGUFConfig, GGUFQuantizer
from qexp.quantizers.rows import WeightSpec
from tests.backends import CPU
from tests.loading.gguf_files import finish
from tests.loading.test_saving import files_of_at_most
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


def test_a_saved_file_is_the_librarys_byte_for_byte(tmp_path: Path) -> None:
    weight: Any = quantized(gaussian(3, 64), "Q4_0")
    plain, scalar, empty = torch.arange(10.0).reshape(2, 5), torch.tensor(3), torch.zeros(0, 4, dtype=torch.float16)
    writer = gguf.GGUFWriter(tmp_path / "library.gguf", "flux")
    writer.add_custom_alignment(64)
    writer.add_uint32("general.quantization_version", 2)
    writer.add_string("x.name", "ö")
    writer.add_tensor("q", weight.raw.numpy(), raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    for name, tensor in {"p": plain, "s": scalar, "e": empty}.items():
        writer.add_tensor(name, tensor.numpy())
    finish(writer)
    tensors = {"q": weight, "p": plain, "s": scalar, "e": empty}
    save_gguf(tmp_path / "mine.gguf", tensors, architecture="flux", metadata={"x.name": "ö"})
    assert (tmp_path / "mine.gguf").read_bytes() == (tmp_path / "library.gguf").read_bytes()


def test_empty_texts_are_saved_and_dense_tensors_have_no_quantization_version(tmp_path: Path) -> None:
    save_gguf(tmp_path / "x.gguf", {"a": torch.zeros(2)}, architecture="x", metadata={"x.note": ""})
    found = read_gguf_header(tmp_path / "x.gguf").metadata
    assert found == {"general.architecture": "x", "general.alignment": 64, "x.note": ""}


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def as_stored(tensor: Tensor) -> Tensor:
        alive.append(sum(copy() is not None for copy in copies))
        copies.append(weakref.ref(stored := tensor.float()))
        return stored

    monkeypatch.setattr("qexp.loading.gguf_saving._as_stored", as_stored)
    save_gguf(tmp_path / "x.gguf", {name: torch.ones(9).bfloat16() for name in "abc"}, architecture="x")
    assert alive == [0, 0, 0]


def test_a_full_disk_leaves_the_file_before(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    save_gguf(path, {"a": torch.ones(2)}, architecture="x")
    before = path.read_bytes()
    with files_of_at_most(8192), pytest.raises(DiskError, match=os.strerror(errno.EFBIG)):
        save_gguf(path, {"a": torch.ones(2), "b": torch.ones(8192)}, architecture="x")
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["x.gguf"]


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
