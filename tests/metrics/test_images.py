import math

import numpy as np
import pytest
import torch
from torch import Tensor

from qexp.metrics import psnr_db as psnr_db_file
from qexp.metrics import ssim as ssim_file
from qexp.metrics.registry import Samples, all_metrics
from qexp.metrics.ssim import ssim as ssim_result

NAMES = ("psnr_db", "ssim", "relative_l2", "cosine", "exact")


def compare_images(images: Tensor, reference: Tensor, *, is_complete: bool = True) -> dict[str, float | None]:
    """The metrics of two sets of images, as scoring computes them."""
    samples = Samples({"images": images}, {"images": reference}, [(reference, images)], is_complete)
    found = {name: all_metrics()[f"quality/{name}"].compute(samples) for name in NAMES}
    return {name: getattr(result, "value", result) for name, result in found.items()}


def psnr_db(images: Tensor, reference: Tensor) -> float | None:
    return psnr_db_file.psnr_db(images, reference).value


def ssim(images: Tensor, reference: Tensor) -> float | None:
    return ssim_result(images, reference).value


def random_images(count: int = 6, channels: int = 1, side: int = 8, seed: int = 0) -> Tensor:
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def off_by(values: list[float]) -> tuple[Tensor, Tensor]:
    reference = torch.zeros(len(values), 1, 8, 8)
    return reference + torch.tensor(values).view(-1, 1, 1, 1), reference


def test_psnr_is_the_mean_over_the_images() -> None:
    # 10 log10(4 / 0.2²) = 20 dB and 10 log10(4 / 0.02²) = 40 dB; the pooled error would give 22.97 dB
    assert psnr_db(*off_by([0.2, 0.02])) == pytest.approx(30, abs=1e-4)


def test_psnr_leaves_out_images_that_are_identical() -> None:
    assert psnr_db(*off_by([0.2, 0.0, 0.02])) == pytest.approx(30, abs=1e-4)
    assert compare_images(*off_by([0.2, 0.0, 0.02]))["exact"] == 0
    result = psnr_db_file.psnr_db(*off_by([0.2, 0.0, 0.02]))
    assert result.samples == [pytest.approx(20, abs=1e-4), math.inf, pytest.approx(40, abs=1e-4)]
    assert result.also == {"quality/differing_images": 2}


def test_images_compared_with_themselves() -> None:
    numbers = compare_images(random_images(), random_images())
    assert numbers == {"psnr_db": None, "ssim": pytest.approx(1, abs=1e-12), "relative_l2": 0, "cosine": 1, "exact": 1}


def numpy_ssim(a: np.ndarray, b: np.ndarray, sigma: float, taps: int) -> float:
    """SSIM of one channel, pixel by pixel: Gaussian window, reflected borders, range 2."""
    axis = np.arange(taps) - taps // 2
    window = np.exp(-(axis**2) / (2 * sigma**2))
    window = np.outer(window, window) / window.sum() ** 2
    a, b = (np.pad(image, taps // 2, mode="reflect") for image in (a, b))
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    values = []
    for row in range(a.shape[0] - taps + 1):
        for column in range(a.shape[1] - taps + 1):
            x, y = (image[row : row + taps, column : column + taps] for image in (a, b))
            mx, my = (window * x).sum(), (window * y).sum()
            vx, vy, cov = (
                (window * x * x).sum() - mx**2,
                (window * y * y).sum() - my**2,
                (window * x * y).sum() - mx * my,
            )
            values.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return float(np.mean(values))


@pytest.mark.parametrize(("side", "sigma", "taps"), [(8, 0.8, 7), (20, 1.5, 11)])
def test_ssim_agrees_with_numpy(side: int, sigma: float, taps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssim_file, "BATCH_ELEMENTS", 4 * side**2)  # batches of 4, 4, 4, 4 and 2
    reference = random_images(18, side=side)
    images = (reference + 0.3 * random_images(18, side=side, seed=1)).clamp(-1, 1)
    expected = [
        numpy_ssim(a[0], b[0], sigma, taps)
        for a, b in zip(images.double().numpy(), reference.double().numpy(), strict=True)
    ]
    assert ssim(images, reference) == pytest.approx(np.mean(expected), abs=1e-9)


@pytest.mark.exhaustive  # importing torchmetrics takes seconds
@pytest.mark.parametrize(
    "shape", [(200, 1, 8, 8), (3, 3, 16, 40), (2, 4, 15, 4), (2, 3, 4, 70), (5, 3, 17, 33), (1, 3, 200, 150)]
)
@pytest.mark.parametrize("kind", ["noise", "near", "inverted", "constant", "equal"])
def test_ssim_is_that_of_torchmetrics(shape: tuple[int, ...], kind: str) -> None:
    from torchmetrics.functional.image import structural_similarity_index_measure

    torch.manual_seed(0)
    reference = torch.zeros(shape) if kind == "constant" else torch.rand(shape) * 2 - 1
    images = {
        "noise": torch.rand(shape) * 2 - 1,
        "near": reference + 0.01 * torch.randn(shape),
        "inverted": -reference,
        "constant": reference + 0.5,
        "equal": reference,
    }[kind]
    sigma = 1.5 if min(shape[-2:]) >= 16 else 0.8
    expected = structural_similarity_index_measure(
        images.double(), reference.double(), sigma=sigma, data_range=2.0, reduction="none"
    )
    result = ssim_result(images, reference)
    assert result.samples == pytest.approx(expected.flatten().tolist(), abs=1e-9)
    assert result.value == pytest.approx(expected.mean().item(), abs=1e-9)


def test_ssim_of_images_smaller_than_its_border_is_undefined() -> None:
    assert ssim(random_images(side=3), random_images(side=3, seed=1)) is None
    assert ssim(random_images(side=4), random_images(side=4)) == pytest.approx(1, abs=1e-12)


def test_relative_l2_and_cosine_are_over_all_images() -> None:
    reference = random_images(3, channels=3)
    images = reference + 0.1 * random_images(3, channels=3, seed=1)
    a, b = reference.double().numpy().ravel(), images.double().numpy().ravel()
    numbers = compare_images(images, reference)
    assert numbers["relative_l2"] == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a))
    assert numbers["cosine"] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_values_that_are_not_finite_leave_no_number(value: float, side: int) -> None:
    pair = [random_images(), random_images(seed=1)]
    pair[side][2, 0, 3, 3] = value
    assert compare_images(*pair) == dict.fromkeys(["psnr_db", "ssim", "relative_l2", "cosine"]) | {"exact": 0}


def test_different_numbers_of_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(6, 1, 8, 8\) and \(5, 1, 8, 8\)"):
        compare_images(random_images(6), random_images(5))
