"""Quantized activations: the library's scales, found once, stored, and the same answers after a reload."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qexp.config.offload import OffloadConfig
from qexp.config.schema import ComponentConfig, LoaderConfig
from qexp.errors import ConfigError, LoadError
from qexp.loading.lifecycle import load_component
from qexp.loading.saving import save_model
from qexp.offloading.payload import leaves
from qexp.offloading.strategies import apply_offload
from qexp.quantizers.quanto import QuantoConfig
from qexp.quantizers.quanto_support.library import library
from tests.backends import CPU, Stack, StackSource, save_stack
from tests.quantizers.test_contract import gaussian

BF16 = torch.bfloat16
SHAPES = [(128, 256), (64, 128)]  # of a stack's layers, [out, in]
LARGEST = {"int8": 127, "float8": 448, "float8_e5m2": 57344}


def load(folder: Path, weights: str = "int8", activations: str | None = "int8") -> Any:
    config = QuantoConfig(weights_dtype=weights, activations_dtype=activations)
    source = StackSource(folder)
    return load_component(source, "stack", ComponentConfig(config), device=CPU, loader=LoaderConfig()).model


def calibrated(folder: Path, *arguments: str) -> Any:
    model = load(folder, *arguments)
    model.hf_quantizer.calibrate(model, lambda: [model(batch) for batch in batches(dtype=model.layers[0].weight.dtype)])
    return model


def batches(count: int = 3, dtype: torch.dtype = BF16) -> list[Tensor]:
    return [gaussian(32, 256, dtype=dtype, seed=seed) for seed in range(1, 1 + count)]


@torch.no_grad()
def answer(model: nn.Module, dtype: torch.dtype = BF16) -> Tensor:
    return model(gaussian(9, 256, dtype=dtype, seed=7))


def rounded(x: Tensor, scale: Tensor, kind: str) -> Tensor:
    """What an 8-bit input stands for, by the formats' definitions; the division is in the layer's dtype."""
    steps = (x / scale).double().clamp(-LARGEST[kind], LARGEST[kind])
    if kind == "int8":
        return steps.round() * scale.double()
    dtype = torch.float8_e5m2 if kind == "float8_e5m2" else torch.float8_e4m3fn
    return steps.float().to(dtype).double() * scale.double()


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("activations", LARGEST)
@pytest.mark.parametrize("weights", ["int8", "int4", "int2", "float8", "float8_e5m2"])
def test_a_layer_multiplies_what_its_input_is_rounded_to(
    weights: str, activations: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    save_stack(tmp_path, [(64, 256)], dtype=dtype)
    model = calibrated(tmp_path, weights, activations)
    layer, x = model.layers[0], gaussian(9, 256, dtype=dtype, seed=7)
    scale, kind = layer.input_scale, activations
    means = torch.tensor([0.81, 0.09, 0.1])  # of three batches: 0.9 of the mean so far, 0.1 of the next
    largest = torch.stack([batch.abs().max() for batch in batches(dtype=dtype)]).float()
    assert scale.dtype == dtype
    assert scale.item() == pytest.approx((means @ largest / LARGEST[kind]).item(), rel=0.02)
    dense = layer.weight.dequantize().double()
    expected = rounded(x, scale, kind) @ dense.T + layer.bias.double()
    assert (model(x).double() - expected).norm() / expected.norm() < 0.01
    plain = x.double() @ dense.T + layer.bias.double()
    assert (expected - plain).norm() > 0  # or the first line would show nothing


@pytest.mark.parametrize("activations", ["int8", "float8"])
@pytest.mark.parametrize("weights", ["int8", "float8", "int2"])
def test_scales_weights_and_answers_are_the_librarys(weights: str, activations: str, tmp_path: Path) -> None:
    quanto, dense = library(), nn.Sequential(*save_stack(tmp_path, [(64, 256)], dtype=BF16).layers)
    quanto.quantize(dense, weights=getattr(quanto, f"q{weights}"), activations=getattr(quanto, f"q{activations}"))
    quanto.freeze(dense)
    with torch.no_grad(), quanto.Calibration():
        for batch in batches():
            dense(batch)
    mine = calibrated(tmp_path, weights, activations)
    ours, theirs = mine.layers[0], dense[0]
    assert torch.equal(ours.input_scale, theirs.input_scale)
    assert torch.equal(ours.output_scale, theirs.output_scale)
    for one, other in zip(leaves(ours.weight), leaves(theirs.weight), strict=True):
        assert torch.equal(one, other)
    assert ours.weight.__tensor_flatten__()[1] == theirs.weight.__tensor_flatten__()[1]
    assert torch.equal(answer(mine), answer(dense))


def test_nothing_computes_or_is_saved_before_the_scales_are_known(tmp_path: Path) -> None:
    save_stack(tmp_path / "dense", SHAPES, dtype=BF16)
    model = load(tmp_path / "dense")
    assert model.hf_quantizer.requires_calibration
    with pytest.raises(ConfigError, match=r"activations_dtype=int8: the scales .*hf_quantizer\.calibrate\(model"):
        answer(model)
    with pytest.raises(ConfigError, match=r"save: the scales of activations are not known yet"):
        save_model(model, tmp_path / "saved")


def test_fp16_is_refused_with_the_reason(tmp_path: Path) -> None:
    """float8_e5m2 by float8_e5m2: both scales are about 4 / 57344 = 7e-5, their product is below fp16's 6e-8."""
    assert (torch.tensor(7e-5, dtype=torch.float16) ** 2).item() == 0
    save_stack(tmp_path, SHAPES, dtype=torch.float16)
    with pytest.raises(
        ConfigError, match=r"activations_dtype=int8 with compute_dtype=fp16: .*use compute_dtype=bf16 or fp32"
    ):
        load(tmp_path)
    load(tmp_path, activations=None)


def test_layers_that_no_sample_reaches_are_named(tmp_path: Path) -> None:
    save_stack(tmp_path, SHAPES, dtype=BF16)
    model = load(tmp_path)
    with pytest.raises(ConfigError, match=r"1 layers were reached by no sample of the calibration: 'layers\.1'"):
        model.hf_quantizer.calibrate(model, lambda: model.layers[0](batches()[0]))
    with pytest.raises(ConfigError, match="not known yet"):
        answer(model)
    with pytest.raises(ConfigError, match=r"have inputs that are not finite: 'layers\.0', 'layers\.1'"):
        model.hf_quantizer.calibrate(model, lambda: model(batches()[0] / 0))


@pytest.mark.parametrize("activations", ["int8", "float8"])
def test_inputs_of_zeros_get_a_scale_of_one(activations: str, tmp_path: Path) -> None:
    """A scale of zero would divide: NaN for zeros in float8, and zeros in int8 for whatever comes later."""
    save_stack(tmp_path, SHAPES, dtype=BF16, bias=False)
    model = load(tmp_path, activations=activations)
    model.hf_quantizer.calibrate(model, lambda: model(torch.zeros(4, 256, dtype=BF16)))
    assert [layer.input_scale.item() for layer in model.layers] == [1, 1]
    assert torch.equal(model(torch.zeros(4, 256, dtype=BF16)), torch.zeros(4, 64, dtype=BF16))
    assert answer(model).isfinite().all() and answer(model).any()
    samples = batches()
    model.hf_quantizer.calibrate(model, lambda: [model(batch) for batch in [torch.zeros_like(samples[0]), *samples]])
    expected = calibrated(tmp_path, "int8", activations)  # a first sample of zeros says nothing of the others
    assert [layer.input_scale for layer in model.layers] == [layer.input_scale for layer in expected.layers]


@pytest.mark.parametrize("activations", ["int8", "float8"])
@pytest.mark.parametrize("weights", ["int8", "int4", "float8_e5m2"])
def test_a_saved_model_answers_the_same_without_calibration(weights: str, activations: str, tmp_path: Path) -> None:
    save_stack(tmp_path / "dense", SHAPES, dtype=BF16)
    model = calibrated(tmp_path / "dense", weights, activations)
    save_model(model, tmp_path / "saved")
    again = load(tmp_path / "saved", weights, activations)
    assert not again.hf_quantizer.requires_calibration
    assert torch.equal(again.layers[1].input_scale, model.layers[1].input_scale)
    assert torch.equal(answer(again), answer(model))
    save_model(again, tmp_path / "again")
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()


@pytest.mark.parametrize("weights", ["int8", "int2"])
def test_the_library_opens_what_is_saved(weights: str, tmp_path: Path) -> None:
    save_stack(tmp_path / "dense", SHAPES, dtype=BF16)
    model = calibrated(tmp_path / "dense", weights)
    save_model(model, tmp_path / "saved")
    theirs, state = Stack(SHAPES).to(BF16), load_file(tmp_path / "saved" / "diffusion_pytorch_model.safetensors")
    kinds = {f"layers.{i}": {"weights": f"q{weights}", "activations": "qint8"} for i in range(len(SHAPES))}
    library().requantize(theirs, state, kinds, device=CPU)
    for layer in theirs.layers:
        layer.disable_output_quantization()  # which it forgets that it had turned off
    assert torch.equal(answer(theirs), answer(model))


def test_a_file_without_its_scales_is_refused(tmp_path: Path) -> None:
    save_stack(tmp_path / "dense", SHAPES, dtype=BF16)
    save_model(calibrated(tmp_path / "dense"), tmp_path / "saved")
    file = tmp_path / "saved" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if name != "layers.1.input_scale"}, file)
    with pytest.raises(LoadError, match=r"lacks 'layers\.1\.input_scale'"):
        load(tmp_path / "saved")


def test_a_calibrated_model_is_offloaded_and_dequantized(tmp_path: Path) -> None:
    save_stack(tmp_path / "dense", SHAPES, dtype=BF16)
    model = calibrated(tmp_path / "dense")
    expected, weights = answer(model), [layer.weight.dequantize() for layer in model.layers]
    settings = OffloadConfig(strategy="leaf", to="disk").resolved("cpu")
    offload = apply_offload(model, settings, device=CPU, block_lists=("layers",), store=tmp_path / "store")
    assert torch.equal(answer(model), expected)
    assert offload.statistics()["offload/copies"] > 0
    model.hf_quantizer.calibrate(model, lambda: model(batches()[0]))  # on what came last
    assert not torch.equal(answer(model), expected)
    model.hf_quantizer.calibrate(model, lambda: [model(batch) for batch in batches()])
    assert torch.equal(answer(model), expected)
    dense = calibrated(tmp_path / "dense")
    restored: Any = dense.hf_quantizer.dequantize(dense)
    for layer, weight in zip(restored.layers, weights, strict=True):
        assert type(layer) is nn.Linear
        assert not layer._forward_pre_hooks
        assert torch.equal(layer.weight, weight)


def test_fields_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"activations_dtype='int4' is unknown; use float8, .* or int8, or null"):
        QuantoConfig(activations_dtype="int4")
    with pytest.raises(ConfigError, match="calibration_samples=0 must be 1 or more"):
        QuantoConfig(calibration_samples=0)
    assert QuantoConfig().ignored_fields() == {"calibration_samples"}
    assert QuantoConfig(activations_dtype="int8").ignored_fields() == set()
    assert QuantoConfig.from_dict({"weights": "int8", "activations": "float8"}).activations_dtype == "float8"
