"""LPIPS, CLIP score and FID with made weights in a temporary cache, against torchmetrics' formulas and numpy."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from qexp.config.generate import GenerateConfig
from qexp.config.schema import MetricsConfig
from qexp.errors import ConfigError, LoadError
from qexp.metrics.backbones import Backbone
from qexp.metrics.inception import SIDE, Inception, resized
from qexp.metrics.registry import Samples, all_metrics
from qexp.models.arithmetic import ASSETS
from qexp.results.run_folder import RunFolder, Status, now_iso
from qexp.scoring import perceptual, perceptual_files
from qexp.scoring.perceptual import perceptual_tools
from qexp.scoring.perceptual_files import BACKBONE_SOURCES, INCEPTION_SOURCES, heads_file
from qexp.scoring.score import score
from qexp.sweep.resume import decide, scored_names
from qexp.system.memory import without_collector
from tests.assigning import run_config
from tests.cpu_time import quiet_seconds
from tests.language import TOKENIZER
from tests.products import exhaustive
from tests.scoring.test_score import outputs, write_run

PROMPTS = ("543+870=", "100-100=", "000+000=")


@pytest.fixture
def torch_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of torch.hub."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def save_backbone(folder: Path, net: str) -> dict[str, Tensor]:
    """Made weights of a classifier under torchvision's name, with a part that LPIPS has no use for."""
    torch.manual_seed(0)
    state = {**Backbone(net).state_dict(), "classifier.1.weight": torch.zeros(3)}
    torch.save(state, folder / BACKBONE_SOURCES[net].rpartition("/")[2])
    return state


def images(count: int, channels: int, side: int, seed: int = 0) -> Tensor:
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def numbers(
    metrics: MetricsConfig, ours: Tensor, others: Tensor | None, prompts: Any = None
) -> dict[str, float | None]:
    """The metrics of images as scoring computes them."""
    expected = None if others is None else {"images": others}
    samples = Samples({"images": ours}, expected, prompts=prompts, tools=perceptual_tools(metrics, ours, others))
    found = {name: all_metrics()[f"quality/{name}"].compute(samples) for name in metrics.names}
    return {name: getattr(result, "value", result) for name, result in found.items()}


# LPIPS


def torchvision_features(net: str) -> nn.Sequential:
    """As in torchvision/models, written out."""
    if net == "alexnet":
        widths: list[Any] = [(3, 64, 11, 4, 2), "M", (64, 192, 5, 1, 2), "M", (192, 384, 3, 1, 1), (384, 256, 3, 1, 1)]
        widths += [(256, 256, 3, 1, 1), "M"]
        pool = nn.MaxPool2d(kernel_size=3, stride=2)
    else:
        pairs = [(3, 64), (64, 64), "M", (64, 128), (128, 128), "M", (128, 256), (256, 256), (256, 256), "M"]
        pairs += [(256, 512), (512, 512), (512, 512), "M", (512, 512), (512, 512), (512, 512), "M"]
        widths = [pair if pair == "M" else (*pair, 3, 1, 1) for pair in pairs]
        pool = nn.MaxPool2d(kernel_size=2, stride=2)
    layers = [[pool] if one == "M" else [nn.Conv2d(*one), nn.ReLU()] for one in widths]
    return nn.Sequential(*itertools.chain(*layers))


@pytest.mark.parametrize(
    ("net", "name", "parameters"), [("alex", "alexnet", 2_469_696), exhaustive("vgg", "vgg16", 14_714_688)]
)
def test_lpips_is_that_of_torchmetrics(
    net: str, name: str, parameters: int, torch_hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchmetrics.functional.image import lpips as theirs

    state = save_backbone(torch_hub, net)
    features = torchvision_features(name)
    features.load_state_dict({key.removeprefix("features."): state[key] for key in state if "features" in key})
    assert sum(parameter.numel() for parameter in features.parameters()) == parameters  # as published
    monkeypatch.setattr(theirs, "_get_tv_model_features", lambda *_: features)
    model = theirs._LPIPS(net=net).eval()
    ours, others = images(3, 3, 96), images(3, 3, 96, seed=1)
    with torch.no_grad():
        expected = model(ours, others).mean().item()
    metrics = MetricsConfig(names=("lpips",), lpips_net=net)
    assert numbers(metrics, ours, others)["lpips"] == pytest.approx(expected, rel=1e-5)
    assert numbers(metrics, ours, ours) == {"lpips": 0}
    assert numbers(metrics, ours, None) == {"lpips": None}


def test_small_grey_images_are_enlarged_for_lpips(torch_hub: Path) -> None:
    save_backbone(torch_hub, "alex")
    metrics = MetricsConfig(names=("lpips",))
    small, other = images(2, 1, 8), images(2, 1, 8, seed=1)
    large, others = (x.expand(-1, 3, -1, -1).repeat_interleave(8, 2).repeat_interleave(8, 3) for x in (small, other))
    assert numbers(metrics, small, other) == numbers(metrics, large, others)
    small[0, 0, 0, 0] = torch.nan
    assert numbers(metrics, small, other) == {"lpips": None}


# CLIP


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    torch.manual_seed(0)
    size: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    text = CLIPTextConfig(
        **size, vocab_size=32, max_position_embeddings=12, projection_dim=16, bos_token_id=1, eos_token_id=2
    )
    vision = CLIPVisionConfig(**size, image_size=32, patch_size=8, projection_dim=16)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    for name in TOKENIZER:
        shutil.copy(ASSETS / name, folder / name)
    return folder


class WithPlainFeatures:
    """transformers' CLIP as torchmetrics expects it: features that are tensors."""

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config

    def to(self, device: torch.device) -> WithPlainFeatures:
        return self

    def get_image_features(self, pixels: Tensor) -> Tensor:
        return self.model.get_image_features(pixels).pooler_output

    def get_text_features(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return self.model.get_text_features(tokens, mask).pooler_output


@pytest.mark.parametrize("sign", [1, -1])
def test_clip_score_is_that_of_torchmetrics(
    sign: int, clip: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from torchmetrics.functional.multimodal.clip_score import _clip_score_update
    from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

    tokenizer, processor = AutoTokenizer.from_pretrained(clip), CLIPImageProcessorPil.from_pretrained(clip)

    def process(text: Any = None, images: Any = None, **options: Any) -> Any:
        return processor(images, return_tensors="pt") if text is None else tokenizer(text, **options)

    model = CLIPModel.from_pretrained(clip).eval()
    model.visual_projection.weight.data *= sign  # all cosines turn round
    clip = shutil.copytree(clip, tmp_path / "clip")
    model.save_pretrained(clip)
    ours = images(6, 3, 40)
    pixels = ((ours + 1) * 127.5).round().to(torch.uint8)
    texts = [prompt for prompt in PROMPTS for _ in range(2)]  # two images of each prompt
    with torch.no_grad():
        scores, _ = _clip_score_update(list(pixels), texts, WithPlainFeatures(model), process)
    expected = max(scores.mean().item(), 0)
    assert abs(scores.mean().item()) > 0.1
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789" * 4
    shutil.copytree(clip, tmp_path / "models--tiny--clip" / "snapshots" / commit)
    (tmp_path / "models--tiny--clip" / "refs").mkdir()
    (tmp_path / "models--tiny--clip" / "refs" / "main").write_text(commit)
    for name in (str(clip), "tiny/clip"):
        metrics = MetricsConfig(names=("clip_score",), clip_model=name)
        assert numbers(metrics, ours, None, prompts=PROMPTS)["clip_score"] == pytest.approx(expected, rel=1e-4)
    long = ("543+870=" * 9,)  # longer than the model's 12 positions
    assert numbers(metrics, ours, None, prompts=long)["clip_score"] is not None
    (clip / "preprocessor_config.json").unlink()
    CLIPProcessor(processor, tokenizer).save_pretrained(clip)  # which calls the file processor_config.json
    assert not (clip / "preprocessor_config.json").exists()
    metrics = MetricsConfig(names=("clip_score",), clip_model=str(clip))
    assert numbers(metrics, ours, None, prompts=PROMPTS)["clip_score"] == pytest.approx(expected, rel=1e-4)
    assert numbers(metrics, ours[:5], None, prompts=PROMPTS) == {"clip_score": None}  # 5 images of 3 prompts


# FID


def test_the_networks_size_is_the_published_one() -> None:
    with torch.device("meta"):
        network = Inception()
    assert sum(parameter.numel() for parameter in network.parameters()) == 21_785_568  # without the classifier
    assert sum(isinstance(module, nn.Conv2d) for module in network.modules()) == 94


@pytest.mark.parametrize("shape", [(8, 8), (300, 17)])
def test_images_are_resized_as_tensorflow_1_did(shape: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, shape).astype(np.float64)
    expected = np.zeros((SIDE, SIDE))
    for row in range(SIDE):
        for column in range(SIDE):
            y, x = row * shape[0] / SIDE, column * shape[1] / SIDE
            top, left = int(y), int(x)
            bottom, right = min(top + 1, shape[0] - 1), min(left + 1, shape[1] - 1)
            upper = image[top, left] * (1 - x + left) + image[top, right] * (x - left)
            lower = image[bottom, left] * (1 - x + left) + image[bottom, right] * (x - left)
            expected[row, column] = upper * (1 - y + top) + lower * (y - top)
    found = resized(torch.from_numpy(image).float()[None, None])[0, 0]
    assert np.allclose(found.numpy(), expected, atol=1e-2)


class FewFeatures(nn.Module):
    """Six numbers of an image instead of 2,048."""

    def load(self, state: dict[str, Tensor]) -> None:
        self.weight = state["weight"]

    def forward(self, pixels: Tensor) -> Tensor:
        assert pixels.dtype == torch.uint8 and pixels.shape[1] == 3
        return torch.cat([pixels.float().mean((2, 3)), pixels.float().std((2, 3))], 1) @ self.weight


def test_fid_against_the_reference_and_against_a_folder(
    torch_hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scipy import linalg

    monkeypatch.setattr(perceptual, "Inception", FewFeatures)
    weight = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    torch.save({"weight": weight}, torch_hub / INCEPTION_SOURCES[1].rpartition("/")[2])
    ours, others = images(40, 1, 8), images(40, 1, 8, seed=1) * 0.5
    real = tmp_path / "real"
    real.mkdir()
    pixels = [((x.expand(-1, 3, -1, -1) + 1) * 127.5).round().to(torch.uint8) for x in (ours, others)]
    for number, image in enumerate(pixels[1]):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(real / f"{number:03}.png")

    def features(values: Tensor) -> np.ndarray:
        x = values.numpy().astype(np.float64)
        return np.concatenate([x.mean((2, 3)), x.std((2, 3), ddof=1)], 1) @ weight.double().numpy()

    (m1, s1), (m2, s2) = ((x.mean(0), np.cov(x.T)) for x in map(features, pixels))
    expected = ((m1 - m2) ** 2).sum() + np.trace(s1 + s2 - 2 * linalg.sqrtm(s1 @ s2).real)
    metrics = MetricsConfig(names=("fid",))
    assert numbers(metrics, ours, others)["fid"] == pytest.approx(expected, rel=1e-3)
    of_folder = MetricsConfig(names=("fid",), fid_images=str(real))
    assert numbers(of_folder, ours, None)["fid"] == pytest.approx(expected, rel=1e-3)
    assert numbers(metrics, ours, ours)["fid"] == pytest.approx(0, abs=1e-3)
    assert numbers(metrics, ours, None) == {"fid": None} == numbers(metrics, ours[:1], others[:1])
    (real / "000.png").write_bytes(b"nothing")
    with pytest.raises(LoadError, match=r"000\.png' is no image that can be opened"):
        numbers(of_folder, ours, None)


def test_a_file_of_other_weights_is_refused(torch_hub: Path) -> None:
    place = torch_hub / BACKBONE_SOURCES["alex"].rpartition("/")[2]
    for content, message in (
        ({"features.0.weight": torch.zeros(1)}, "does not fit Backbone"),
        (b"PK", "is no file of"),
    ):
        place.write_bytes(content) if isinstance(content, bytes) else torch.save(content, place)
        with pytest.raises(LoadError, match=f"alexnet-owt-7be5be79.pth' {message}.*download it again"):
            numbers(MetricsConfig(names=("lpips",)), images(1, 1, 8), images(1, 1, 8))


# Before the run


MISSING = [
    (("metrics.names=[lpips]",), r"lpips needs '.*alexnet-owt-7be5be79\.pth', which is not there; download"),
    (("metrics.names=[lpips]", "metrics.lpips_net=vgg"), r"lpips needs '.*vgg16-397923af\.pth'.*TORCH_HOME"),
    (("metrics.names=[fid]",), r"fid needs '.*weights-inception-2015-12-05-6726825d\.pth', which is not there"),
    (("metrics.names=[clip_score]", "task.prompt=a"), r"clip_model=openai/clip-vit-base-patch16: .*hf download"),
    (("metrics.names=[clip_score]", "task.prompt=a", "metrics.clip_model=/no"), r"clip_model=/no: there is no"),
    (("metrics.names=[clip_score]", "task.prompt=a", "metrics.clip_model={tmp}"), r"lacks 'config\.json', 'prep"),
    (("metrics.names=[clip_score]",), r"clip_score compares images with their prompts"),
    (("metrics=perceptual", "metrics.missing=error"), r"lpips needs .*alexnet-owt.*`pip install torchvision"),
    (("metrics=perceptual", "task.prompt=a", "metrics.clip_model=/no"), r"clip_model=/no: there is no"),
]


@pytest.fixture
def empty_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # nothing is asked, whatever it says


def fail(overrides: tuple[str, ...], message: str, folder: Path) -> None:
    with pytest.raises((ConfigError, LoadError), match=message):
        run_config(*(one.replace("{tmp}", str(folder)) for one in overrides))


@pytest.mark.parametrize(("overrides", "message"), MISSING)
def test_what_is_missing_is_said(
    overrides: tuple[str, ...], message: str, torch_hub: Path, empty_hub: None, tmp_path: Path
) -> None:
    fail(overrides, message, tmp_path)


@pytest.mark.parametrize(("overrides", "message"), [MISSING[number] for number in (0, 2, 5)])  # one of each metric
def test_what_is_missing_is_said_at_once(
    overrides: tuple[str, ...], message: str, torch_hub: Path, empty_hub: None, tmp_path: Path
) -> None:
    fail(overrides, message, tmp_path)  # imports are not what is measured
    with without_collector():
        assert quiet_seconds(lambda: fail(overrides, message, tmp_path), repeats=1) < 1


def test_metric_without_its_files_is_left_out_with_the_command(
    torch_hub: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    perceptual_files._say_once.cache_clear()
    names = run_config("metrics=perceptual").metrics.names
    assert not {"lpips", "clip_score", "fid"} & {*names} and "psnr_db" in names
    run_config("metrics=perceptual")
    notes = [line for line in capfd.readouterr().err.splitlines() if line.startswith("note: ")]
    lpips, clip, fid = notes  # once, however many experiments
    assert f"needs '{torch_hub / 'alexnet-owt-7be5be79.pth'}'" in lpips
    assert """python -c "from torchvision.models import alexnet; alexnet(weights='DEFAULT')\"""" in lpips
    assert "quality/clip_score is left out" in clip and "task.prompt is null" in clip
    name = "weights-inception-2015-12-05-6726825d.pth"
    assert f"curl -L --create-dirs -o {torch_hub / name} https://github.com/toshas/torch-fidelity" in fid
    (torch_hub / BACKBONE_SOURCES["alex"].rpartition("/")[2]).touch()
    assert "lpips" in run_config("metrics=perceptual").metrics.names


def test_a_folder_of_real_images_has_images(torch_hub: Path, tmp_path: Path) -> None:
    (torch_hub / INCEPTION_SOURCES[0].rpartition("/")[2]).touch()
    with pytest.raises(ConfigError, match=r"metrics\.fid_images=.* holds 0 images .*at least two"):
        run_config("metrics.names=[fid]", f"metrics.fid_images={tmp_path}")


def test_other_tasks_need_none_of_it(torch_hub: Path) -> None:
    assert "lpips" in run_config("metrics=perceptual", "task=roundtrip").metrics.names
    assert "lpips" in run_config("metrics=perceptual", "model=arithmetic").metrics.names


def test_the_heads_come_with_torchmetrics() -> None:
    assert heads_file("alex").is_file() and heads_file("vgg").is_file()


# From saved outputs


def test_a_run_is_scored_from_its_files(torch_hub: Path, tmp_path: Path) -> None:
    save_backbone(torch_hub, "alex")
    reference, run = write_run(tmp_path / "a", outputs()), write_run(tmp_path / "b", outputs(error=0.2))
    config: Any = run_config("metrics.names=[psnr_db,lpips]")
    result = score(config, run, reference)
    assert set(result) == {
        f"quality/{name}" for name in ("psnr_db", "lpips", "exact", "finite", "images", "differing_images")
    }
    assert (
        result["quality/lpips"] == numbers(config.metrics, outputs(error=0.2)["images"], outputs()["images"])["lpips"]
    )
    text: Any = SimpleNamespace(
        model=config.model, seed=config.seed, task=GenerateConfig(), metrics=MetricsConfig(names=("psnr_db",))
    )
    assert "quality/lpips" not in score(text, run, reference)


def test_another_setting_is_another_score(torch_hub: Path, tmp_path: Path) -> None:
    for net in ("alex", "vgg"):
        (torch_hub / BACKBONE_SOURCES[net].rpartition("/")[2]).touch()
    folder = RunFolder(write_run(tmp_path / "run", outputs()))
    config = run_config("metrics.names=[psnr_db,lpips]")
    folder.write_status(Status("done", 1, now_iso()))
    folder.write_json("result.json", {"scored": config.metrics.scored(), "env": {}})
    assert config.metrics.scored() == {"names": ["psnr_db", "lpips"], "lpips_net": "alex"}
    assert decide(config, folder).action == "keep"
    assert decide(run_config("metrics.names=[psnr_db]", "metrics.lpips_net=vgg"), folder).action == "keep"
    other = run_config("metrics.names=[psnr_db,lpips]", "metrics.lpips_net=vgg")
    assert (decide(other, folder).action, decide(other, folder).why) == ("score", "for lpips")
    assert scored_names(folder.read_result() or {}, other.metrics) == ("psnr_db",)
