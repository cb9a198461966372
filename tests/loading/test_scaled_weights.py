"""Weights in 8 bits with scales, as other programs write them; the right value is multiplied out here, by numpy."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import qexp
from qexp.errors import LoadError
from tests.backends import save_state
from tests.products import diagonal

FP8 = torch.float8_e4m3fn
LAYERS = ("first", "second")


class Net(nn.Module):
    def __init__(self, width: int = 192, out: int = 320) -> None:
        super().__init__()
        self.first = nn.Linear(width, out)
        self.second = nn.Linear(out, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def scaled(weight: Tensor, rows: int, columns: int, dtype: torch.dtype, largest: float) -> tuple[Tensor, Tensor]:
    """(numbers, scale [out/rows, in/columns]) of a weight in blocks, the last of which may be smaller."""
    counts = -(-weight.shape[0] // rows), -(-weight.shape[1] // columns)
    numbers, scale = torch.empty_like(weight), torch.empty(counts)
    for i in range(counts[0]):
        for j in range(counts[1]):
            part = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            scale[i, j] = weight[part].abs().max() / largest
            numbers[part] = weight[part] / scale[i, j]
    return (numbers.round() if dtype == torch.int8 else numbers).to(dtype), scale


def multiplied_out(numbers: Tensor, scale: Tensor, rows: int, columns: int) -> Tensor:
    factors = np.kron(scale.double().numpy(), np.ones((rows, columns)))[: numbers.shape[0], : numbers.shape[1]]
    return torch.from_numpy((numbers.float().numpy().astype(np.float64) * factors).astype(np.float32))


# layout -> (rows and columns of a block, by the weight's shape; name of the scale; its shape, if not [blocks]; dtype)
LAYOUTS: dict[str, tuple[Any, str, Any, torch.dtype]] = {
    "ComfyUI, one number": (lambda o, i: (o, i), "scale_weight", (), FP8),
    "one number of e5m2": (lambda o, i: (o, i), "weight_scale", (1,), torch.float8_e5m2),
    "one a row, [out, 1]": (lambda o, i: (1, i), "weight_scale", None, FP8),
    "one a row, [out]": (lambda o, i: (1, i), "weight_scale", (-1,), FP8),
    "blocks of 128, ragged": (lambda o, i: (128, 128), "weight_scale_inv", None, FP8),
    "blocks of 64": (lambda o, i: (64, 64), "weight_scale", None, FP8),
    "groups of 32": (lambda o, i: (1, 32), "weight_scale", None, FP8),
    "int8, one a row": (lambda o, i: (1, i), "weight_scale", None, torch.int8),
}


def save(folder: Path, layout: str, extra: dict[str, Tensor] | None = None, **config: Any) -> dict[str, Tensor]:
    """A checkpoint in a layout; returns the weights that it stands for, in fp32."""
    blocks, name, shape, dtype = LAYOUTS[layout]
    torch.manual_seed(0)
    state, want = {}, {}
    for key, value in Net().state_dict().items():
        if not key.endswith("weight"):
            state[key] = want[key] = value.bfloat16()
            continue
        rows, columns = blocks(*value.shape)
        numbers, scale = scaled(value, rows, columns, dtype, 127 if dtype == torch.int8 else torch.finfo(dtype).max)
        want[key] = multiplied_out(numbers, scale, rows, columns)
        state[key] = numbers
        state[key.removesuffix("weight") + name] = scale if shape is None else scale.reshape(shape)
    save_state(folder, state | (extra or {}), {"width": 192, **config})
    return want


def load(folder: Path, backend: Any = None, **options: Any) -> Any:
    return qexp.load(folder, backend, skeleton=Net, device="cpu", compute_dtype="fp32", **options)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scaled_weight_is_its_numbers_times_its_scales(layout: str, tmp_path: Path) -> None:
    want = save(tmp_path, layout)
    got = load(tmp_path).state_dict()
    for name in want:
        assert torch.allclose(got[name], want[name].float(), rtol=3e-7, atol=0), name


@pytest.mark.parametrize(
    ("layout", "backend"),
    diagonal(["ComfyUI, one number", "blocks of 128, ragged"], ["bitsandbytes", "torchao", "gguf", "packed_uint4"]),
)
def test_scaled_weight_is_quantized_as_the_dense_one(layout: str, backend: str, tmp_path: Path) -> None:
    want = save(tmp_path / "scaled", layout)
    save_state(tmp_path / "dense", {name: value.float() for name, value in want.items()}, {"width": 192})
    ours, dense = (load(tmp_path / name, backend).dequantize().state_dict() for name in ("scaled", "dense"))
    assert all(torch.equal(ours[name], dense[name]) for name in dense)


QUANTIZED_SO = {
    "transformers' fp8": {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["x"]},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "float-quantized"},
}


@pytest.mark.parametrize("name", QUANTIZED_SO)
def test_config_that_says_no_more_than_scales_is_read(name: str, tmp_path: Path) -> None:
    layout = "blocks of 128, ragged" if name == "transformers' fp8" else "one a row, [out, 1]"
    want = save(tmp_path, layout, quantization_config=QUANTIZED_SO[name])
    model = load(tmp_path)
    assert torch.allclose(model.first.weight, want["first.weight"], rtol=3e-7, atol=0)
    assert torch.allclose(load(tmp_path, "torchao")(torch.ones(1, 192)), model(torch.ones(1, 192)), rtol=0.1, atol=0.02)


def said(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def test_marks_and_scales_of_activations_are_no_weights(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    extra = {"scaled_fp8": torch.zeros(0, dtype=FP8), "first.scale_input": torch.ones(())}
    extra |= {"second.input_scale": torch.ones(1), "first.comfy_quant": said('{"format": "float8_e4m3fn"}')}
    want = save(tmp_path, "ComfyUI, one number", extra)
    assert torch.allclose(load(tmp_path).first.weight, want["first.weight"], rtol=3e-7, atol=0)
    assert "have no place" not in capfd.readouterr().err


REFUSED: dict[str, tuple[dict[str, Tensor], str]] = {
    "a format of ComfyUI's": ({"first.comfy_quant": said('{"format": "nvfp4"}')}, "'first.comfy_quant' .*'nvfp4'"),
    "a zero point": ({"first.weight_zero_point": torch.ones(320, 1)}, "'first.weight' .*first.weight_zero_point"),
    "a second scale": ({"first.weight_scale": torch.ones(())}, "'first.weight' .*scale_weight.*weight_scale"),
    "a scale of columns": ({"first.scale_weight": torch.ones(1, 191)}, r"'first.scale_weight' \[1, 191\] F32 cannot"),
    "a scale in whole numbers": ({"first.scale_weight": torch.ones(320).int()}, "'first.scale_weight' .*I32 cannot"),
    "what nobody knows": (
        {"first.smooth": torch.ones(192)},
        "first.smooth.* beside 'first.weight'.*nothing here reads",
    ),
    "a low-rank correction": ({"second.lora_A.weight": torch.ones(4, 320)}, "second.lora_A.weight.* 'second.weight'"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_weight_that_needs_more_than_a_scale_is_an_error(what: str, tmp_path: Path) -> None:
    extra, message = REFUSED[what]
    save(tmp_path, "ComfyUI, one number", extra)
    with pytest.raises(LoadError, match=message):
        load(tmp_path)


def test_format_in_the_files_metadata_is_checked(tmp_path: Path) -> None:
    save(tmp_path, "ComfyUI, one number")
    state = load_file(tmp_path / "model.safetensors")
    metadata = {"_quantization_metadata": json.dumps({"layers": {"first": {"format": "mxfp8"}}})}
    save_file(state, tmp_path / "model.safetensors", metadata)
    with pytest.raises(LoadError, match="'first' has the format 'mxfp8', which is not supported"):
        load(tmp_path)


@pytest.mark.parametrize("dtype", [FP8, torch.float8_e5m2])
def test_float8_without_scales_is_an_error_unless_it_is_said_to_be_plain(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = {name: value.to(dtype) for name, value in Net().state_dict().items()}
    save_state(tmp_path, state, {"width": 192})
    with pytest.raises(LoadError, match=r"'first\.\w+' is F8_E\dM\d in .*plain_fp8=true"):
        load(tmp_path)
    got = load(tmp_path, plain_fp8=True).state_dict()
    assert all(torch.equal(got[name], state[name].float()) for name in state)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_whole_numbers_without_scales_are_an_error_that_names_them(dtype: torch.dtype, tmp_path: Path) -> None:
    save_state(tmp_path, {name: value.to(dtype) for name, value in Net().state_dict().items()}, {"width": 192})
    with pytest.raises(LoadError, match=r"'first\.\w+' is [IU]8"):
        load(tmp_path)


def test_scales_of_an_authors_layout_are_applied_before_it_is_converted(tmp_path: Path) -> None:
    """q, k and v in one matrix, with one scale."""
    from diffusers import SD3Transformer2DModel

    from tests.models.test_single_file import WEIGHTS, _authors_layout, save_network

    own = SD3Transformer2DModel.from_pretrained(save_network("SD3Transformer2DModel", tmp_path)).state_dict()
    state = {}
    for name, value in _authors_layout(own).items():
        state[name] = value
        if value.ndim == 2 and name.endswith(".weight"):
            numbers, scale = scaled(value, *value.shape, FP8, 448)
            state |= {name: numbers, name.removesuffix("weight") + "scale_weight": scale.reshape(())}
    (tmp_path / WEIGHTS).unlink()
    save_file(state, tmp_path / "sd3.safetensors")
    got = qexp.load(tmp_path / "sd3.safetensors", device="cpu", compute_dtype="fp32").state_dict()
    assert got.keys() == own.keys()
    for name in own:
        largest = own[name].abs().max()
        # 3 bits behind the point, scaled by the largest
        assert (got[name] - own[name]).abs().max() <= largest / 14, name
    layer = "transformer_blocks.0.attn.to_k.weight"
    assert not torch.equal(got[layer], own[layer])


def test_counters_of_frozen_batch_norms_are_no_numbers_that_lack_a_meaning(tmp_path: Path) -> None:
    want = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).eval()
    save_state(tmp_path, want.state_dict())

    def build(config: Any) -> nn.Module:
        norm = nn.BatchNorm1d(8)
        del norm._buffers["num_batches_tracked"]
        return nn.Sequential(nn.Linear(8, 8), norm)

    assert torch.equal(qexp.load(tmp_path, skeleton=build, device="cpu")(torch.ones(1, 8)), want(torch.ones(1, 8)))
