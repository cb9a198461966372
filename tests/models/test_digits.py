import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from qexp.config.generate import GenerateConfig
from qexp.errors import LoadError
from qexp.models.digits import ASSETS, Config, Source
from qexp.models.digits_network import NULL_LABEL, DigitsClassifier, DigitsConfig, DigitsTransformer

CPU = torch.device("cpu")


class Velocity(nn.Module):
    """A stand-in network whose velocity is a given function of (state, t, label); remembers what it was called with."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, images: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        self.calls.append((images, t, labels))
        return self.function(images, t[:, None, None, None], labels[:, None, None, None])


def small_transformer() -> DigitsTransformer:
    torch.manual_seed(0)
    return DigitsTransformer(DigitsConfig(width=32, depth=1, heads=2)).eval()


def generate(model: nn.Module, seed: int = 0, device: torch.device = CPU, on_step=None, **task) -> dict[str, Tensor]:
    models, on_step = {"transformer": model}, on_step or (lambda step, state: None)
    return Source(Config()).generate(models, GenerateConfig(**task), seed=seed, device=device, on_step=on_step)


def states_of(model: nn.Module, **task) -> list[Tensor]:
    """The state after each step."""
    states: list[Tensor] = []
    generate(model, on_step=lambda step, state: states.append(state), **task)
    return states


def noise(count: int) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))


# Sampling


def test_outputs_are_clamped_images_of_the_digits_in_turn() -> None:
    outputs = generate(Velocity(lambda x, t, y: -5 * torch.sign(x)), num_images=12, num_inference_steps=3)
    assert outputs["labels"].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    images = outputs["images"]
    assert images.shape == (12, 1, 8, 8) and images.dtype == torch.float32
    torch.testing.assert_close(images, torch.sign(noise(12)))  # |noise| + 5 -> 1


def test_euler_steps_go_from_1_to_0() -> None:
    model = Velocity(lambda x, t, y: 0.25 * x)
    outputs = generate(model, num_images=3, num_inference_steps=4)
    assert [call[1].tolist() for call in model.calls] == [[1.0] * 3, [0.75] * 3, [0.5] * 3, [0.25] * 3]
    torch.testing.assert_close(outputs["images"], (noise(3) * (1 - 0.25 / 4) ** 4).clamp(-1, 1))


def test_exact_velocity_of_a_straight_path_ends_at_its_image() -> None:
    image = torch.linspace(-1, 1, 64).view(1, 1, 8, 8)
    # x_t = (1 - t) image + t noise, so noise - image = (x_t - image) / t at every t above 0
    outputs = generate(Velocity(lambda x, t, y: (x - image) / t), num_images=5, num_inference_steps=7)
    torch.testing.assert_close(outputs["images"], image.expand(5, -1, -1, -1), atol=1e-5, rtol=0)


def test_on_step_sees_every_state() -> None:
    seen: list[tuple[int, Tensor]] = []
    model = Velocity(lambda x, t, y: torch.ones_like(x))
    generate(model, num_images=2, num_inference_steps=4, on_step=lambda step, state: seen.append((step, state)))
    assert [step for step, _ in seen] == [1, 2, 3, 4]
    for step, state in seen:
        torch.testing.assert_close(state, noise(2) - step / 4)


def test_state_stays_in_fp32_under_a_bf16_network() -> None:
    model = Velocity(lambda x, t, y: torch.full_like(x, 0.0078125, dtype=torch.bfloat16))
    states = states_of(model, num_images=1, num_inference_steps=64)
    assert all(state.dtype == torch.float32 for state in states)
    torch.testing.assert_close(states[-1], noise(1) - 0.0078125, atol=1e-6, rtol=0)  # bf16 sums would not move


def test_same_seed_same_bits_and_other_seed_other_images() -> None:
    model = small_transformer()
    first = generate(model, seed=3, num_images=10, num_inference_steps=2)["images"]
    torch.manual_seed(99)  # the global generator has no say
    assert torch.equal(first, generate(model, seed=3, num_images=10, num_inference_steps=2)["images"])
    assert not torch.equal(first, generate(model, seed=4, num_images=10, num_inference_steps=2)["images"])


def test_sampling_leaves_the_global_generator_alone() -> None:
    model = small_transformer()
    before = torch.get_rng_state()
    generate(model, num_images=2, num_inference_steps=1)
    assert torch.equal(before, torch.get_rng_state())


def test_noise_does_not_depend_on_the_number_of_images_or_the_default_device() -> None:
    model = Velocity(lambda x, t, y: torch.zeros_like(x))
    generate(model, num_images=20, num_inference_steps=1)
    with torch.device("meta"):  # what a caller may have set, as loaders do
        generate(model, num_images=7, num_inference_steps=1)
    assert torch.equal(model.calls[0][0][:7], model.calls[1][0]) and torch.equal(model.calls[1][0], noise(7))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_same_noise_and_same_digits_on_cuda() -> None:
    device = torch.device("cuda:0")
    model = small_transformer()
    states: list[Tensor] = []
    on_cpu = generate(model, num_images=10, num_inference_steps=4)["images"]
    model.to(device)
    hook = model.register_forward_pre_hook(lambda module, inputs: states.append(inputs[0]))
    on_cuda = generate(model, device=device, num_images=10, num_inference_steps=4)["images"]
    hook.remove()
    assert states[0].device == device and torch.equal(states[0].cpu(), noise(10))
    assert on_cuda.device == CPU
    torch.testing.assert_close(on_cuda, on_cpu, atol=1e-3, rtol=0)


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_guidance_extrapolates_from_the_null_label(scale: float) -> None:
    assert NULL_LABEL == 10
    model = Velocity(lambda x, t, y: (y / 100).expand_as(x))  # v_null = 0.1
    (state,) = states_of(model, num_images=4, num_inference_steps=1, guidance_scale=scale)
    labels = torch.arange(4).view(4, 1, 1, 1) / 100
    torch.testing.assert_close(state, noise(4) - (0.1 + scale * (labels - 0.1)))
    assert [len(call[0]) for call in model.calls] == [4 if scale == 1 else 8]  # one forward a step in either case


def test_a_value_that_is_not_finite_is_nan_in_the_images() -> None:
    def overflow(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.where(y == 1, torch.inf, 0.0).expand_as(x)

    images = generate(Velocity(overflow), num_images=3, num_inference_steps=1)["images"]
    assert images[1].isnan().all() and images[[0, 2]].isfinite().all()


# Checkpoints and skeleton


def test_embedded_checkpoint_is_the_default_and_a_path_replaces_it(tmp_path: Path) -> None:
    assert Source(Config()).checkpoints() == {"transformer": ASSETS}
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "diffusion_pytorch_model-00001-of-00002.safetensors").touch()
    assert Source(Config(path=str(tmp_path))).checkpoints() == {"transformer": tmp_path}
    assert tuple(Source(Config()).checkpoints()) == Source(Config()).components()


def test_a_gguf_file_or_a_folder_with_one_is_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    file = tmp_path / "x.gguf"
    file.touch()
    for place in (tmp_path, file):
        assert Source(Config(path=str(place))).checkpoints() == {"transformer": place}
    with pytest.raises(LoadError, match=r"nowhere\.gguf': it does not exist; set model\.path"):
        Source(Config(path=str(tmp_path / "nowhere.gguf"))).checkpoints()


@pytest.mark.parametrize(("present", "absent"), [([], "config.json"), (["config.json"], "safetensors")])
def test_missing_checkpoint_files_are_named(tmp_path: Path, present: list[str], absent: str) -> None:
    for name in present:
        (tmp_path / name).write_text("{}")
    with pytest.raises(LoadError, match=rf"model\.path='{tmp_path}': no .*{absent}.*set model\.path"):
        Source(Config(path=str(tmp_path))).checkpoints()


def test_skeleton_follows_the_config_on_the_current_device() -> None:
    stored = {"_class_name": "DigitsTransformer", "width": 64, "depth": 3, "heads": 2, "quantization_config": {"a": 1}}
    with torch.device("meta"):
        model = Source(Config()).skeleton("transformer", stored)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert len(model.blocks) == 3 and model.blocks[0].attn.to_q.weight.shape == (64, 64)
    assert Source(Config()).block_lists(model) == ["blocks"]


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"_class_name": "FluxTransformer2DModel"}, "_class_name='FluxTransformer2DModel'.*DigitsTransformer"),
        ({"widht": 256}, "'widht' is no field.*depth, heads"),
        ({"width": 256.0}, "width=256.0 must be a whole number"),
        ({"depth": 0}, "depth=0 must be"),
        ({"width": 100, "heads": 3}, "heads=3 does not divide width=100"),
        ({"patch_size": 3}, "patch_size=3 does not divide image_size=8"),
        ({"image_size": 16}, "image_size=16.*8x8"),
    ],
)
def test_config_that_does_not_fit_is_refused(stored: dict[str, object], message: str) -> None:
    with pytest.raises(LoadError, match=message):
        Source(Config()).skeleton("transformer", stored)


# Scores


def independent_scores(images: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Accuracy and Fréchet distance with numpy: tr((S1 S2)^½) from the eigenvalues of the product itself."""
    tensors = load_file(ASSETS / "classifier.safetensors")
    mean, covariance = (tensors.pop(f"real_features.{name}").numpy() for name in ("mean", "covariance"))
    classifier = DigitsClassifier()
    classifier.load_state_dict(tensors)
    with torch.no_grad():
        features = classifier.features(torch.from_numpy(images)).numpy().astype(np.float64)
        predicted = classifier(torch.from_numpy(images)).argmax(-1).numpy()
    own = np.cov(features, rowvar=False)
    cross = np.sqrt(np.linalg.eigvals(own @ covariance).real.clip(0)).sum()
    distance = ((features.mean(0) - mean) ** 2).sum() + np.trace(own + covariance) - 2 * cross
    return float((predicted == labels).mean()), float(distance)


def random_outputs(count: int) -> dict[str, Tensor]:
    images = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return {"images": images, "labels": torch.arange(count) % 10}


def test_scores_agree_with_numpy() -> None:
    outputs = random_outputs(100)
    scores = Source(Config()).scores(outputs)
    accuracy, distance = independent_scores(outputs["images"].numpy(), outputs["labels"].numpy())
    assert scores["class_accuracy"] == pytest.approx(accuracy)
    assert scores["frechet_distance"] == pytest.approx(distance, rel=1e-6)
    assert distance > 1  # noise is far from digits


def test_broken_images_are_wrong_whatever_the_classifier_says() -> None:
    outputs = random_outputs(20)
    outputs["images"][:, 0, 0, 0] = torch.nan
    assert Source(Config()).scores(outputs) == {"class_accuracy": 0.0, "frechet_distance": None}


def test_one_image_has_no_frechet_distance() -> None:
    assert Source(Config()).scores(random_outputs(1))["frechet_distance"] is None


def test_trained_model_draws_digits() -> None:
    folder = Source(Config()).checkpoints()["transformer"]
    assert json.loads((folder / "training.json").read_text())["classifier_held_out_accuracy"] >= 0.97
    model = Source(Config()).skeleton("transformer", json.loads((folder / "config.json").read_text()))
    model.to(torch.bfloat16).load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))
    outputs = generate(model.eval(), num_images=100, num_inference_steps=10)
    scores = Source(Config()).scores(outputs)
    accuracy, distance = independent_scores(outputs["images"].numpy(), outputs["labels"].numpy())
    assert scores["class_accuracy"] == pytest.approx(accuracy) and accuracy >= 0.9
    assert scores["frechet_distance"] == pytest.approx(distance, rel=1e-4)
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 12 * 2**20
