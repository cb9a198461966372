from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qexp.errors import DiskError
from qexp.metrics.pictures import GAP, TITLE_HEIGHT, difference_sheet, image_sheet, save_png

TOP = 2 * TITLE_HEIGHT + GAP
PITCH = 32 + GAP  # 8x8 images are enlarged four times


def test_images_are_in_reading_order_enlarged_without_smoothing() -> None:
    images = torch.full((23, 1, 8, 8), -1.0)
    images[12, 0, 2, 5] = 1.0  # second row, third column
    picture = np.asarray(image_sheet(images, "title", torch.arange(23) % 10))
    assert picture.shape == (TOP + 3 * PITCH, GAP + 10 * PITCH, 3)
    cell = picture[TOP + PITCH :, GAP + 2 * PITCH :][:32, :32]
    expected = np.zeros((32, 32, 3))
    expected[8:12, 20:24] = 255
    assert np.array_equal(cell, expected)


def test_values_map_to_grey_and_colour() -> None:
    grey = np.asarray(image_sheet(torch.zeros(1, 1, 8, 8), "", torch.zeros(1)))[TOP + 5, GAP + 5]
    assert grey.tolist() == [128, 128, 128]  # 0 is the middle of -1 .. 1
    colour = torch.tensor([1.0, -1.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 64, 64)
    picture = np.asarray(image_sheet(colour, "", torch.zeros(1)))
    assert picture.shape == (TOP + 64 + GAP, 2 * GAP + 64, 3)  # large images keep their size
    assert picture[TOP + 5, GAP + 5].tolist() == [255, 0, 128]


def test_pixels_that_are_not_finite_are_magenta() -> None:
    images = torch.zeros(1, 1, 8, 8)
    images[0, 0, 0, 0], images[0, 0, 0, 1] = torch.nan, torch.inf
    picture = np.asarray(image_sheet(images, "", torch.zeros(1)))
    assert picture[TOP, GAP].tolist() == picture[TOP, GAP + 4].tolist() == [255, 0, 255]
    assert picture[TOP, GAP + 8].tolist() == [128, 128, 128]


def test_difference_is_absolute_and_white_from_1() -> None:
    images = torch.zeros(3, 1, 8, 8)
    reference = torch.tensor([0.0, 0.5, -1.5]).view(3, 1, 1, 1).expand(3, 1, 8, 8)
    picture = np.asarray(difference_sheet(images, reference, "", torch.zeros(3)))
    assert [picture[TOP, GAP + column * PITCH, 0] for column in range(3)] == [0, 128, 255]


def test_columns_are_named_only_if_they_hold_one_label() -> None:
    def header(labels: torch.Tensor) -> np.ndarray:
        return np.asarray(image_sheet(torch.zeros(20, 1, 8, 8), "", labels))[TITLE_HEIGHT : TOP - 1]

    assert header(torch.arange(20) % 10).min() < 128
    assert header(torch.arange(20)).min() == 255


def test_at_most_a_hundred_images_are_shown() -> None:
    picture = image_sheet(torch.zeros(205, 1, 8, 8), "", torch.arange(205) % 10)
    assert picture.size == (GAP + 10 * PITCH, TOP + 10 * PITCH)


def test_written_file_is_complete_and_alone(tmp_path: Path) -> None:
    path = tmp_path / "images" / "grid.png"
    picture = image_sheet(torch.zeros(3, 1, 8, 8), "a title", torch.arange(3))
    for _ in range(2):  # an existing picture is replaced
        save_png(picture, path)
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(picture))
    assert [file.name for file in path.parent.iterdir()] == ["grid.png"]


def test_failed_write_names_the_file_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "images").write_text("a file where a folder should be")
    picture = image_sheet(torch.zeros(1, 1, 8, 8), "", torch.zeros(1))
    with pytest.raises(DiskError, match=r"images/grid\.png"):
        save_png(picture, tmp_path / "images" / "grid.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(DiskError, match=r"folder\.png"):
        save_png(picture, tmp_path / "folder.png")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder.png", "images"]
