"""`.gguf` files as checkpoints: every type that gguf-py decodes, into a model, with gguf-py's weights."""

import gc
import json
import os
import random
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, cast

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qexp.checkpoints.checkpoint import GGUF_CONFIG_KEY, open_checkpoint
from qexp.checkpoints.gguf_types import DECODABLE, ENCODABLE, TYPES
from qexp.errors import ConfigError, LoadError
from qexp.loading import weights
from qexp.loading.component import LoadedComponent
from qexp.loading.gguf_saving import save_gguf
from qexp.offloading.payload import leaves, module_nbytes, true_nbytes
from qexp.quantizers.gguf_blocks.tensor import GGUFTensor
from tests.checkpoints.test_gguf_header import mutated
from tests.loading.gguf_files import finish
from tests.loading.toys import load_toy, save_state, settings
from tests.products import representatives
from tests.quantizers.test_contract import gaussian

FP32, BF16 = torch.float32, torch.bfloat16
WIDTH, WORDS = 256, 6


class Reader(nn.Module):
    """A blocked tensor of every kind: linear weights, an embedding, a norm, a parameter of three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.first = nn.Linear(WIDTH, 2 * WIDTH)
        self.second = nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.taps = nn.Parameter(torch.ones(2, 3, WIDTH))
        self.register_buffer("mask", torch.tensor([True, False]))

    def forward(self, words: Tensor) -> Tensor:
        x = self.norm(self.embed(words)) * self.taps.sum(dim=(0, 1))
        return self.second(self.first(x.to(self.first.bias.dtype)))


@cache
def pool(name: str, low: float, high: float) -> np.ndarray:
    """200 random blocks whose largest weight is in low..high, and no number is missing."""
    kind, rng = TYPES[name], np.random.default_rng(0)
    found = np.empty((0, kind.block_bytes), np.uint8)
    while len(found) < 200:
        new = rng.integers(0, 256, (1000, kind.block_bytes), dtype=np.uint8)
        with np.errstate(all="ignore"):
            largest = np.abs(decoded(name, new)).max(axis=1)
        found = np.concatenate([found, new[(low <= largest) & (largest <= high)]])  # NaN is neither
    return found[:200]


def blocks(name: str, rows: int, columns: int, seed: int = 0, low: float = 0, high: float = 100) -> np.ndarray:
    """Encoded rows of random blocks, whose largest weight is in low..high."""
    count = rows * columns // TYPES[name].block
    return pool(name, low, high)[np.random.default_rng(seed).integers(0, 200, count)].reshape(rows, -1)


def decoded(name: str, raw: np.ndarray) -> np.ndarray:
    return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name])


def write(path: Path, tensors: Mapping[str, tuple[str, np.ndarray]], metadata: Mapping[str, str] | None = None) -> Path:
    """A file by gguf-py of {name: (type, blocks, or numbers)}."""
    writer = gguf.GGUFWriter(path, "test")
    for key, value in (metadata or {}).items():
        writer.add_string(key, value)
    for tensor, (name, data) in tensors.items():
        kind = gguf.GGMLQuantizationType[name] if TYPES[name].block > 1 else None
        writer.add_tensor(tensor, data, raw_dtype=kind)
    return finish(writer, path)


def reader_tensors(name: str) -> dict[str, tuple[str, np.ndarray]]:
    plain = {"first.bias": gaussian(2 * WIDTH, seed=1), "norm.bias": gaussian(WIDTH, seed=2)}
    tensors = {key: ("F32", value.numpy()) for key, value in plain.items()}
    for seed, (key, rows, columns) in enumerate(
        [("first.weight", 2 * WIDTH, WIDTH), ("second.weight", WIDTH, 2 * WIDTH), ("embed.weight", WORDS, WIDTH)]
    ):
        tensors[key] = (name, blocks(name, rows, columns, seed))
    tensors["norm.weight"] = (name, blocks(name, 1, WIDTH, 3)[0])
    tensors["taps"] = (name, blocks(name, 6, WIDTH, 4).reshape(2, 3, -1))
    tensors["mask"] = ("I8", np.array([0, 1], np.int8))
    return tensors


def load_file(path: Path, backend: str = "none", *overrides: str, **fields: Any) -> LoadedComponent:
    return load_toy(path, settings(backend, *overrides, **fields), Reader)


# Every type


@pytest.mark.parametrize("name", representatives(DECODABLE, ["Q8_0", "Q4_0", "Q6_K", "IQ4_XS", "MXFP4", "TQ1_0"]))
def test_every_type_is_loaded_into_a_model(name: str, tmp_path: Path) -> None:
    tensors = reader_tensors(name)
    loaded = load_file(write(tmp_path / "x.gguf", tensors))
    model: Any = loaded.model
    dense = Reader().requires_grad_(False)
    state = {key: torch.from_numpy(decoded(*value)) for key, value in tensors.items() if key != "mask"}
    dense.load_state_dict(state | {"mask": torch.tensor([False, True])})
    for layer in (model.first, model.second):
        assert isinstance(layer.weight, GGUFTensor) and type(layer) is nn.Linear
    assert np.array_equal(model.first.weight.raw.numpy(), tensors["first.weight"][1])
    assert np.array_equal(model.second.weight.raw.numpy(), tensors["second.weight"][1])
    for key in ("embed.weight", "norm.weight", "taps", "first.bias", "mask"):
        mine, expected = model.get_parameter(key) if key != "mask" else model.mask, dense.state_dict()[key]
        assert torch.equal(mine, expected) and mine.dtype == expected.dtype, key
    words = torch.arange(WORDS)
    with torch.no_grad():
        assert torch.equal(model(words), dense(words))
    plan = loaded.plan.to_container()
    assert set(plan["quantized"]) == {"first", "second"}
    assert plan["result_bytes"] == module_nbytes(model)
    assert plan["read_bytes"] == sum(value.nbytes for _, value in tensors.values())
    assert plan["dense_bytes"] == 4 * sum(tensor.numel() for tensor in state.values()) + 2
    assert model.hf_quantizer.dequantize(model) is model
    for layer in ("first", "second"):
        assert torch.equal(model.get_submodule(layer).weight, getattr(dense, layer).weight)


def test_a_file_of_several_types_that_the_library_encoded(tmp_path: Path) -> None:
    """A layer of each; the type of most bytes names the backend."""
    tensors, dense = {}, {}
    for number, name in enumerate((*ENCODABLE, "F16", "F32")):
        weight = gaussian(64, 512, seed=number).numpy()
        kind = gguf.GGMLQuantizationType[name]
        tensors[f"layers.{number}.weight"] = (name, gguf.quants.quantize(weight, kind))
        dense[number] = decoded(name, tensors[f"layers.{number}.weight"][1])

    def build() -> nn.Module:
        return nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(512, 64, bias=False) for _ in tensors)})

    loaded = load_toy(write(tmp_path / "x.gguf", tensors), settings("none"), build)
    assert loaded.model.hf_quantizer.config.quant_type == "Q8_0"
    assert loaded.plan.skipped == {f"layers.{n}": "the checkpoint holds it unquantized" for n in (8, 9)}
    for number, expected in dense.items():
        weight: Any = loaded.model.get_parameter(f"layers.{number}.weight")
        assert np.array_equal(weight.dequantize(FP32) if number < 8 else weight, expected)
    measured = sum(true_nbytes(parameter) for parameter in loaded.model.parameters())
    assert loaded.plan.to_container()["result_bytes"] == measured


def test_a_file_without_blocks_is_quantized_by_any_backend(tmp_path: Path) -> None:
    state = {key: value for key, value in Reader().state_dict().items() if key != "mask"}
    tensors = {key: ("F16", value.half().numpy()) for key, value in state.items()}
    path = write(tmp_path / "x.gguf", tensors | {"mask": ("I8", np.array([0, 1], np.int8))})
    half = save_state(tmp_path / "half", {**{key: value.half() for key, value in state.items()},
                                          "mask": torch.tensor([False, True])})  # fmt: skip
    for backend in ("torchao", "gguf_q4_0", "none"):
        ours, expected = load_file(path, backend).model, load_file(half, backend).model
        assert torch.equal(ours(torch.arange(WORDS)), expected(torch.arange(WORDS)))


# Settings


@pytest.fixture(scope="module")
def q4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("q4") / "x.gguf", reader_tensors("Q4_K"))


def test_the_dtype_is_the_users_else_upstreams_default(q4: Path) -> None:
    for fields, overrides, plain, multiplied in [
        ({}, (), FP32, None),
        ({"compute_dtype": "bfloat16"}, (), BF16, None),
        ({}, ("compute_dtype=bfloat16",), BF16, BF16),
        ({"compute_dtype": "bfloat16"}, ("compute_dtype=float32",), BF16, FP32),
    ]:
        model: Any = load_file(q4, "gguf", *overrides, **cast(Any, fields)).model
        assert {model.norm.weight.dtype, model.embed.weight.dtype, model.first.bias.dtype} == {plain}
        assert (model.first.weight.dtype, model.first.weight.compute_dtype) == (plain, multiplied)


def test_the_file_wins_over_the_users_backend_and_says_what_lost(q4: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for backend, lost in [("bitsandbytes", "quant_method=bitsandbytes (the checkpoint has gguf)"),
                          ("gguf_q5_1", "quant_type=Q5_1 (the checkpoint has Q4_K)")]:  # fmt: skip
        model: Any = load_file(q4, backend).model
        assert model.quantization_method == "gguf" and model.hf_quantizer.config.quant_type == "Q4_K"
        assert f"' is quantized already; unused: {lost}\n" in capsys.readouterr().err
    for backend in ("none", "gguf"):
        load_file(q4, backend)
        assert "unused" not in capsys.readouterr().err


def test_layers_that_are_skipped_or_kept_in_fp32_are_decoded(q4: Path) -> None:
    expected = torch.from_numpy(decoded(*reader_tensors("Q4_K")["second.weight"]))
    skipped: Any = load_file(q4, skip_modules=("second",), compute_dtype="bfloat16")
    assert torch.equal(skipped.model.second.weight, expected.to(BF16))
    assert skipped.plan.skipped == {"second": "skip_modules has 'second': decoded"}
    own: Any = load_file(q4, "gguf", "modules_to_not_convert=[second]")
    assert torch.equal(own.model.second.weight, expected)
    kept: Any = load_file(q4, keep_in_fp32_modules=("second",), compute_dtype="bfloat16")
    assert torch.equal(kept.model.second.weight, expected)
    assert kept.model(torch.arange(WORDS)).dtype == BF16
    for loaded in (skipped, own, kept):
        assert isinstance(loaded.model.first.weight, GGUFTensor)
        assert loaded.plan.to_container()["result_bytes"] == module_nbytes(loaded.model)
    with pytest.raises(ConfigError, match="skip_modules"):
        load_file(q4, skip_modules=("nowhere",))
    with pytest.raises(LoadError, match=r"no quantized weight is a linear layer's: 'first' .skip_modules .*decoded"):
        load_file(q4, skip_modules=("**",))


def test_blocks_that_are_asked_for_must_be_there(tmp_path: Path) -> None:
    dense = save_state(tmp_path, Reader().state_dict())
    with pytest.raises(ConfigError, match=r"backend\.pre_quantized=true, but the checkpoint has no GGUF blocks"):
        load_file(dense, "gguf", "pre_quantized=true")


def test_a_layer_used_twice_and_stored_once(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(256, 256, bias=False)
            self.other = self.one

    raw = blocks("Q6_K", 256, 256)
    model: Any = load_toy(write(tmp_path / "x.gguf", {"one.weight": ("Q6_K", raw)}), settings("none"), Twice).model
    assert np.array_equal(model.one.weight.raw.numpy(), raw) and np.array_equal(model.other.weight.raw.numpy(), raw)


# Where the config comes from


CONFIG = {"_class_name": "Reader"}


def test_the_config_is_the_one_beside_the_file_or_the_one_in_it(tmp_path: Path) -> None:
    tensors = {"w": ("Q8_0", blocks("Q8_0", 2, 64))}
    bare, full = write(tmp_path / "bare.gguf", tensors), tmp_path / "full.gguf"
    write(full, tensors, {GGUF_CONFIG_KEY: json.dumps({"embedded": 1})})
    assert open_checkpoint(bare).config == {} and open_checkpoint(full).config == {"embedded": 1}
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert open_checkpoint(bare).config == open_checkpoint(full).config == CONFIG
    with pytest.raises(LoadError, match=r"several \.gguf files \('bare\.gguf', 'full\.gguf'\).* set model\.path to"):
        open_checkpoint(tmp_path)
    full.unlink()
    assert open_checkpoint(tmp_path).files == (bare,)
    save_state(tmp_path, {"a": torch.ones(1)}, CONFIG)
    assert open_checkpoint(tmp_path).files == (tmp_path / "model.safetensors",)


@pytest.mark.parametrize(("text", "words"), [("{", "is not valid JSON"), ("[]", "must hold a JSON object")])
def test_a_config_in_a_file_that_is_damaged(text: str, words: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", {"w": ("Q8_0", blocks("Q8_0", 2, 64))}, {GGUF_CONFIG_KEY: text})
    with pytest.raises(LoadError, match=rf"x\.gguf: qexp\.config' {words}"):
        open_checkpoint(path)


def test_a_part_of_a_file_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "test")
    writer.add_uint16("split.count", 3)
    finish(writer)
    with pytest.raises(LoadError, match=r"x\.gguf' is one of 3 parts; merge them"):
        open_checkpoint(tmp_path / "x.gguf")


def test_the_content_hash_follows_the_header(tmp_path: Path) -> None:
    def hash_of(tensors: Mapping[str, tuple[str, np.ndarray]]) -> str:
        path = write(tmp_path / "x.gguf", tensors)
        os.utime(path, (1, 1))
        return open_checkpoint(path).content_hash()

    raw = blocks("Q5_0", 2, 64)
    assert hash_of({"w": ("Q5_0", raw)}) == hash_of({"w": ("Q5_0", raw)})
    assert hash_of({"w": ("Q5_0", raw)}) != hash_of({"v": ("Q5_0", raw)})  # of the same length


# What cannot be loaded


def test_types_that_cannot_be_decoded_are_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "stream", None)
    tensors = {"first.weight": ("Q8_1", np.zeros((512, 8 * 40), np.uint8))}
    with pytest.raises(LoadError, match=r"'first\.weight' in '.*x\.gguf' has type Q8_1, which cannot be decoded"):
        load_file(write(tmp_path / "x.gguf", tensors))


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    tensors = reader_tensors("Q8_0")
    tensors["embed.weight"][1][3, :2] = np.frombuffer(np.float16("inf").tobytes(), np.uint8)
    with pytest.raises(LoadError, match=r"'embed\.weight' is not finite in float32"):
        load_file(write(tmp_path / "x.gguf", tensors))


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    tensors = reader_tensors("Q8_0")
    tensors["first.weight"] = ("Q8_0", blocks("Q8_0", WIDTH, 2 * WIDTH))
    with pytest.raises(LoadError, match=r"'first\.weight' has shape \[256, 512\] .* expects \[512, 256\]"):
        load_file(write(tmp_path / "x.gguf", tensors))


def test_damaged_files_end_in_a_load_error_or_a_model(tmp_path: Path) -> None:
    """400 seeded mutations of a good file, all the way into a model."""
    good = write(tmp_path / "good.gguf", reader_tensors("Q2_K"), {GGUF_CONFIG_KEY: json.dumps(CONFIG)})
    content, path, random_, refusals = good.read_bytes(), tmp_path / "x.gguf", random.Random(0), 0
    described = min(entry.offset for entry in open_checkpoint(good).entries.values())
    for _ in range(400):
        path.write_bytes(mutated(content, described, random_))
        try:
            load_toy(path, settings("none"), Reader, workers=1)
        except LoadError as error:
            refusals += 1
            assert len(str(error)) < 1500
    assert refusals > 200


# What is kept in memory


def test_blocks_are_read_into_their_place_and_the_dense_model_is_never_there(tmp_path: Path) -> None:
    """40 layers, 45 MiB in blocks and 160 MiB dense in bf16, and an embedding of 16 MiB that is decoded."""

    def build() -> nn.Module:
        layers = nn.ModuleList(nn.Linear(2048, 1024, bias=False) for _ in range(40))
        return nn.ModuleDict({"embed": nn.Embedding(4096, 2048), "layers": layers})

    raw = torch.from_numpy(blocks("Q4_0", 1024, 2048))
    tensors: dict[str, Tensor] = {f"layers.{number}.weight": GGUFTensor(raw, "Q4_0", BF16) for number in range(40)}
    tensors["embed.weight"] = GGUFTensor(torch.cat([raw] * 4), "Q4_0", BF16)
    save_gguf(tmp_path / "x.gguf", tensors, architecture="x")
    del tensors
    load_file(write(tmp_path / "small.gguf", reader_tensors("Q8_0")))  # so that everything is imported
    gc.collect()
    loaded = load_toy(tmp_path / "x.gguf", settings("none", compute_dtype="bfloat16"), build)
    result, mib = loaded.plan.to_container()["result_bytes"], 1 << 20
    assert result == 40 * raw.nbytes + 16 * mib
    assert loaded.memory.peak_bytes < result + 40 * mib
    assert loaded.memory.peak_file_bytes < 8 * mib
    for parameter in loaded.model.parameters():
        assert all(leaf.untyped_storage().nbytes() == leaf.nbytes for leaf in leaves(parameter))
