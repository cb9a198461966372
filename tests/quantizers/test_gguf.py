"""GGUF against gguf-py: the same bytes from the same weights, the same weights from the same bytes."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from qexp.checkpoints.gguf_types import DECODABLE, ENCODABLE, TYPES
from qexp.checkpoints.tensor_entry import TensorEntry
from qexp.config.schema import ComponentConfig
from qexp.errors import ConfigError, LoadError
from qexp.loading.lifecycle import request_load
from qexp.loading.prepare import load_quantizer_of, prepare
from qexp.offloading.payload import true_nbytes
from qexp.quantizers.base import load_quantizer
from qexp.quantizers.gguf import GGUFConfig, GGUFQuantizer
from qexp.quantizers.gguf_blocks import decode as gguf_decode
from qexp.quantizers.gguf_blocks.decode import decode, decode_tensor
from qexp.quantizers.gguf_blocks.encode import encode
from qexp.quantizers.rows import WeightSpec
from tests.backends import CPU, StackSource, backend_config, save_stack
from tests.fresh_process import run_python
from tests.quantizers.formulas import fp16
from tests.quantizers.test_contract import gaussian

ROWS, COLUMNS = 48, 1024
COMPILED = ["Q4_0", "Q4_K", "Q6_K", "Q8_0"]  # types with a compiled decoder


def library_encoded(name: str, weight: Tensor | np.ndarray) -> np.ndarray:
    return gguf.quants.quantize(np.asarray(weight), gguf.GGMLQuantizationType[name])


def library_decoded(name: str, raw: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name])


def random_bytes(name: str, rows: int = ROWS, blocks: int = 8, seed: int = 0) -> np.ndarray:
    """Any bytes are valid blocks; the scales of some are infinite, or no numbers."""
    return np.random.default_rng(seed).integers(0, 256, (rows, blocks * TYPES[name].block_bytes), dtype=np.uint8)


def decoded(name: str, raw: np.ndarray | Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    out = torch.empty(raw.shape[0], raw.shape[1] // TYPES[name].block_bytes * TYPES[name].block, dtype=dtype)
    decode(name, torch.as_tensor(raw), out)
    return out


def same(a: Tensor, b: Tensor) -> bool:
    """Equal, NaN in the same places."""
    return a.dtype == b.dtype and bool(((a == b) | (a.isnan() & b.isnan())).all())


def weights() -> Iterator[tuple[str, Tensor]]:
    """What encoders trip over: ties, zeros, one value only, powers of two and their neighbours, small and large."""
    normal = gaussian(ROWS, COLUMNS)
    generator = torch.Generator().manual_seed(1)
    yield "normal", normal
    yield "ties of 8 bits", normal.bfloat16().float()
    yield "ties of quarters", (normal * 4).round() / 4
    yield "integers", (normal * 40).round()
    yield "sparse", torch.where(normal.abs() > 2, normal, 0.0)
    constant = normal.clone()
    constant[::4], constant[1::4], constant[2::4] = 0, 5, -3
    yield "constant", constant
    yield "small", normal * 1e-6
    yield "large", normal * 1e4
    power = torch.exp2(torch.randint(-30, 15, normal.shape, generator=generator).float()) * normal.sign()
    yield "powers of two", power
    yield "below powers of two", torch.nextafter(power, torch.zeros(()))
    yield "above powers of two", torch.nextafter(power, power * 2)


def test_the_types_are_those_of_the_library() -> None:
    sizes = {kind.name: (int(kind), *gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGMLQuantizationType}
    assert {name: (kind.number, kind.block, kind.block_bytes) for name, kind in TYPES.items()} == sizes
    blocked = {kind.name for kind in gguf.quants._type_traits if kind.name != "BF16"}
    assert set(DECODABLE) == blocked


@pytest.mark.parametrize("name", ENCODABLE)
def test_encoders_make_the_librarys_bytes(name: str) -> None:
    for what, weight in weights():
        assert np.array_equal(encode(name, weight).numpy(), library_encoded(name, weight)), what


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ENCODABLE)
def test_encoders_take_16_bit_weights_as_they_are(name: str, dtype: torch.dtype) -> None:
    weight = gaussian(ROWS, COLUMNS, dtype=dtype)
    assert np.array_equal(encode(name, weight).numpy(), library_encoded(name, weight.float()))


def test_what_can_be_encoded_is_what_the_library_can_encode() -> None:
    weight = np.ones((1, 256), np.float32)
    for name in DECODABLE:
        if name in ENCODABLE:
            library_encoded(name, weight)
        else:
            with pytest.raises(NotImplementedError):
                library_encoded(name, weight)


@pytest.mark.parametrize("name", ENCODABLE)
def test_blocks_of_the_smallest_numbers_become_finite(name: str) -> None:
    """1 / d overflows; the library converts what follows from it, infinities and negative numbers, to bytes."""
    weight = gaussian(4, 256) * 1e-40
    weight[1] = -0.0
    error = (decoded(name, encode(name, weight)) - weight).abs().max()
    assert error < 1e-38


@pytest.mark.parametrize("name", DECODABLE)
def test_decoders_give_the_librarys_weights(name: str) -> None:
    raw = random_bytes(name)
    expected = library_decoded(name, raw)
    assert np.array_equal(decoded(name, raw).numpy(), expected, equal_nan=True)
    assert np.isfinite(expected).mean() > 0.5


@pytest.mark.parametrize("name", DECODABLE)
def test_decoding_depends_on_nothing_but_the_bytes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on tiles, memory layout, or torch's default dtype; and 16-bit results are the fp32 ones, rounded."""
    raw = torch.from_numpy(random_bytes(name))
    expected = decoded(name, raw)
    monkeypatch.setitem(gguf_decode.TILE_WEIGHTS, "cpu", 5 * TYPES[name].block)
    odd = torch.empty(raw.numel() + 1, dtype=torch.uint8)[1:].view(raw.shape)  # at an odd address
    wide = torch.empty(raw.shape[0], 2 * raw.shape[1], dtype=torch.uint8)[:, : raw.shape[1]]
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        for copy in (odd.copy_(raw), wide.copy_(raw)):
            assert same(decoded(name, copy), expected)
        one = odd[:1, : TYPES[name].block_bytes]
        assert same(decoded(name, one), expected[:1, : TYPES[name].block])
    finally:
        torch.set_default_dtype(before)
    for dtype in (torch.bfloat16, torch.float16):
        assert same(decoded(name, raw, dtype), expected.to(dtype))


@pytest.mark.parametrize("name", COMPILED)
def test_threads_decode_a_part_each(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from qexp.quantizers.gguf_blocks import kernels

    assert sorted(kernels.DECODED) == COMPILED
    raw = torch.from_numpy(random_bytes(name, rows=7))
    expected, threads = decoded(name, raw), torch.get_num_threads()
    monkeypatch.setattr(kernels, "THREAD_WEIGHTS", 64)
    torch.set_num_threads(3)
    try:
        assert same(decoded(name, raw), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.exhaustive
def test_tables_first_needed_while_something_is_traced_are_real() -> None:
    run_python("""
from contextlib import suppress
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from qexp.quantizers.gguf_blocks.decode import decode
with FakeTensorMode(), suppress(AssertionError):
    decode("MXFP4", torch.full((1, 17), 130, dtype=torch.uint8), torch.empty(1, 32))
out = torch.empty(1, 32)
decode("MXFP4", torch.full((1, 17), 130, dtype=torch.uint8), out)
assert out.tolist() == [[8.0] * 16 + [0.0] * 16], out  # 2^(130 - 128) * (2 of code 2, 0 of code 8)
""")


def test_types_without_decoder_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="Q1_0 cannot be decoded"):
        decoded("Q1_0", np.zeros((1, 18), np.uint8))


def mxfp4(weight: np.ndarray) -> np.ndarray:
    """OCP microscaling: blocks of 32, E2M1 values, scaled by the power of two that puts the absmax in 4..8."""
    blocks = weight.reshape(-1, 32)
    scale = np.exp2(np.floor(np.log2(np.abs(blocks).max(axis=1, keepdims=True))) - 2)
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    nearest = np.abs(np.abs(blocks / scale)[..., None] - values).argmin(axis=-1)
    return (values[nearest] * np.sign(blocks) * scale).reshape(weight.shape)


def ternary(weight: np.ndarray) -> np.ndarray:
    blocks = weight.reshape(-1, 256)
    absmax = np.abs(blocks).max(axis=1, keepdims=True)
    return (np.rint(blocks / absmax) * fp16(absmax)).reshape(weight.shape)


@pytest.mark.parametrize(("name", "formula", "db"), [("MXFP4", mxfp4, 18.79), ("TQ1_0", ternary, None),
                                                     ("TQ2_0", ternary, None)])  # fmt: skip
def test_formats_without_a_yaml_follow_their_formula(
    name: str, formula: Callable[[np.ndarray], np.ndarray], db: float | None
) -> None:
    weight = gaussian(1024, 1024)
    expected = torch.from_numpy(formula(weight.numpy()))
    restored = decoded(name, encode(name, weight))
    assert torch.equal(restored, expected)
    if db is not None:
        sqnr = 20 * torch.log10(weight.norm() / (weight - restored).norm())
        assert sqnr.item() == pytest.approx(db, abs=0.1)


@pytest.mark.parametrize("name", ["TQ1_0", "TQ2_0"])
def test_ternary_weights_are_kept_exactly(name: str) -> None:
    weight = torch.randint(-1, 2, (8, 512), generator=torch.Generator().manual_seed(0)).float() * 0.25
    assert torch.equal(decoded(name, encode(name, weight)), weight)


def create(name: str, weight: Tensor, module: str = "blocks.3") -> Any:
    quantizer = GGUFQuantizer(GGUFConfig(quant_type=name))
    spec = WeightSpec(module, (weight.shape[0], weight.shape[1]), weight.dtype)
    parameter = quantizer.create_quantized_param(spec, [weight], {}, CPU)
    assert true_nbytes(parameter) == quantizer.quantized_nbytes(spec)
    return parameter


@pytest.mark.parametrize("name", ENCODABLE)
def test_every_type_is_quantized_through_the_backend(name: str) -> None:
    weight = gaussian(ROWS, COLUMNS)
    parameter = create(name, weight)
    expected = library_decoded(name, library_encoded(name, weight))
    assert np.array_equal(parameter.dequantize().numpy(), expected)


@pytest.mark.parametrize("name", [name for name in ENCODABLE if name != "MXFP4"])
def test_a_scale_beyond_fp16_is_refused(name: str) -> None:
    weight = gaussian(16, 256)
    weight[7, 3] = 1e8
    with pytest.raises(LoadError, match=rf"'blocks\.3' is too large for {name}.*MXFP4.*skip_modules"):
        create(name, weight)
    create("MXFP4", weight)


def test_layers_that_are_no_whole_blocks_are_left_alone_and_said_so(tmp_path: Path) -> None:
    save_stack(tmp_path, [(64, 48), (32, 64)], dtype=torch.float32)
    request = request_load(StackSource(tmp_path), "stack", ComponentConfig(backend_config("gguf")), device=CPU)
    prepared = prepare(request, load_quantizer_of(request))
    assert set(prepared.chosen) == {"layers.1"}
    assert prepared.plan.skipped == {"layers.0": "Q8_0 has blocks of 32 weights, which do not divide 48"}


def test_stored_blocks_are_wrapped_as_they_are() -> None:
    quantizer = GGUFQuantizer(GGUFConfig())
    raw = random_bytes("Q6_K", rows=6, blocks=2)
    stored = torch.from_numpy(raw).flatten()
    parameter: Any = quantizer.wrap(stored, "Q6_K", (6, 512), torch.bfloat16)
    assert (tuple(parameter.shape), parameter.dtype) == ((6, 512), torch.bfloat16)
    expected = torch.from_numpy(library_decoded("Q6_K", raw))
    assert same(quantizer.dequantize_param(parameter, torch.float32), expected)
    assert parameter.raw.data_ptr() == stored.data_ptr()
    with pytest.raises(LoadError, match="has 2520 bytes, not 2519"):
        quantizer.wrap(stored[1:], "Q6_K", (6, 512), torch.bfloat16)
    with pytest.raises(LoadError, match="not made of whole blocks of 256"):
        quantizer.wrap(stored, "Q6_K", (24, 128), torch.bfloat16)
    with pytest.raises(LoadError, match="GGUF type Q8_1 cannot be decoded"):
        quantizer.wrap(torch.zeros(40, dtype=torch.uint8), "Q8_1", (1, 32), torch.float32)


def test_weights_that_a_file_holds_are_found_and_put_together() -> None:
    """Each in its own type, around the memory that they were read into."""
    quantizer = GGUFQuantizer(GGUFConfig(compute_dtype="float32"))
    raws = {name: torch.from_numpy(random_bytes(name, rows=6, blocks=2)) for name in ("Q4_K", "Q6_K")}
    entries = {f"{name}.weight": TensorEntry(f"{name}.weight", f"GGUF_{name}", (6, 512), Path("x.gguf"), 0, raw.numel())
               for name, raw in raws.items()}  # fmt: skip
    entries["norm.weight"] = TensorEntry("norm.weight", "F32", (512,), Path("x.gguf"), 0, 2048)
    entries["conv.weight"] = TensorEntry("conv.weight", "GGUF_Q4_0", (4, 1, 3, 32), Path("x.gguf"), 0, 216)
    for name, raw in raws.items():
        spec, parts = WeightSpec(name, (6, 512), torch.bfloat16), quantizer.stored_parts(name, entries)
        assert parts is not None and quantizer.stored_nbytes(spec, parts) == raw.numel()
        quantizer.check_quantized_param_shape(spec, parts)
        parameter: Any = quantizer.create_quantized_param(spec, [raw.flatten()], {}, CPU)
        assert (parameter.quant_type, parameter.compute_dtype) == (name, torch.float32)
        assert torch.equal(parameter.raw, raw) and parameter.raw.data_ptr() == raw.data_ptr()
        with pytest.raises(LoadError, match=r"shape \[6, 512\] in 'x\.gguf', but the model expects \[512, 6\]"):
            quantizer.check_quantized_param_shape(WeightSpec(name, (512, 6), torch.bfloat16), parts)
    assert quantizer.stored_parts("norm", entries) is quantizer.stored_parts("absent", entries) is None
    assert quantizer.stored_parts("conv", entries) is None


def test_tensors_of_any_shape_are_decoded() -> None:
    raw = random_bytes("Q4_0", rows=24, blocks=1)
    expected = torch.from_numpy(library_decoded("Q4_0", raw)).view(2, 3, 4, 32)
    assert same(decode_tensor("Q4_0", torch.from_numpy(raw).flatten(), (2, 3, 4, 32), torch.float32), expected)


def test_compute_dtype_is_what_the_layer_multiplies_in() -> None:
    weight, x = gaussian(64, 128, dtype=torch.bfloat16), gaussian(5, 128, seed=1, dtype=torch.bfloat16)
    spec = WeightSpec("x", (64, 128), torch.bfloat16)
    for name, dtype in ((None, torch.bfloat16), ("float32", torch.float32)):
        quantizer = load_quantizer(backend_config("gguf_q4_0", f"compute_dtype={name or 'null'}"))
        parameter = quantizer.create_quantized_param(spec, [weight], {}, CPU)
        output = torch.nn.functional.linear(x, parameter)
        dense = quantizer.dequantize_param(parameter, dtype)
        assert torch.equal(output, torch.nn.functional.linear(x.to(dtype), dense).to(torch.bfloat16))


def test_fields_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"'Q8_O' is unknown \(did you mean Q8_0"):
        GGUFConfig(quant_type="Q8_O")
    with pytest.raises(
        ConfigError, match="'Q4_K' can be read from files, but weights cannot be quantized to it; use MXFP4"
    ):
        GGUFConfig(quant_type="Q4_K")
    with pytest.raises(ConfigError, match=r"'F16' does not quantize; use .*backend=none"):
        GGUFConfig(quant_type="F16")
    with pytest.raises(ConfigError, match=r"backend\.compute_dtype=int8 is not a compute dtype"):
        backend_config("gguf", "compute_dtype=int8")
