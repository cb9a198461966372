from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qexp.errors import DiskError
from qexp.results.numbers import difference_gain
from qexp.scoring.pictures import (
    GAP,
    TITLE_HEIGHT,
    difference_sheet,
    image_sheet,
    save_png,
    write_images,
)

TOP = 2 * TITLE_HEIGHT + GAP
PITCH = 32 + GAP  # 8x8 images are enlarged four times


def digits(count: int) -> list[int]:
    return [number % 10 for number in range(count)]


def test_images_are_in_reading_order_enlarged_without_smoothing() -> None:
    images = torch.full((23, 1, 8, 8), -1.0)
    images[12, 0, 2, 5] = 1.0  # second row, third column
    picture = np.asarray(image_sheet(images, "title", digits(23)))
    assert picture.shape == (TOP + 3 * PITCH, GAP + 10 * PITCH, 3)
    cell = picture[TOP + PITCH :, GAP + 2 * PITCH :][:32, :32]
    expected = np.zeros((32, 32, 3))
    expected[8:12, 20:24] = 255
    assert np.array_equal(cell, expected)


def test_values_map_to_grey_and_colour() -> None:
    grey = np.asarray(image_sheet(torch.zeros(1, 1, 8, 8), "", digits(1)))[TOP + 5, GAP + 5]
    assert grey.tolist() == [128, 128, 128]  # 0 is the middle of -1 .. 1
    colour = torch.tensor([1.0, -1.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 64, 64)
    picture = np.asarray(image_sheet(colour, "", digits(1)))
    assert picture.shape == (TOP + 64 + GAP, 2 * GAP + 64, 3)  # large images keep their size
    assert picture[TOP + 5, GAP + 5].tolist() == [255, 0, 128]


def test_pixels_that_are_not_finite_are_magenta() -> None:
    images = torch.zeros(1, 1, 8, 8)
    images[0, 0, 0, 0], images[0, 0, 0, 1] = torch.nan, torch.inf
    picture = np.asarray(image_sheet(images, "", digits(1)))
    assert picture[TOP, GAP].tolist() == picture[TOP, GAP + 4].tolist() == [255, 0, 255]
    assert picture[TOP, GAP + 8].tolist() == [128, 128, 128]


def test_difference_is_absolute_and_white_from_1() -> None:
    images = torch.zeros(3, 1, 8, 8)
    reference = torch.tensor([0.0, 0.5, -1.5]).view(3, 1, 1, 1).expand(3, 1, 8, 8)
    picture = np.asarray(difference_sheet(images, reference, digits(3)))
    assert [picture[TOP, GAP + column * PITCH, 0] for column in range(3)] == [0, 128, 255]


@pytest.mark.parametrize(
    "largest, gain", [(1.9, 1), (1.0, 1), (0.9, 1), (0.5, 2), (0.3, 2), (0.02, 32), (2.0**-9, 512), (1e-9, 2.0**20)]
)
def test_difference_is_shown_by_the_largest_power_of_two_that_keeps_it_in_range(largest: float, gain: float) -> None:
    difference = torch.linspace(0, largest, 5000).repeat(2)
    assert difference_gain(difference.numpy()) == gain
    others = torch.tensor([float("nan"), float("inf"), 1.9])
    assert difference_gain(torch.cat([difference, others]).numpy()) == gain


def test_difference_of_one_pixel_is_seen_and_none_is_said() -> None:
    images = torch.zeros(50, 1, 8, 8)
    assert difference_gain(images.numpy()) == 1
    identical = np.asarray(difference_sheet(images, images, digits(50)))
    changed = images.clone()
    changed[0, 0, 0, 0] = 0.01
    picture = np.asarray(difference_sheet(changed, images, digits(50)))
    assert picture[TOP, GAP, 0] == round(0.64 * 255) and identical[TOP, GAP, 0] == 0
    assert (picture[:TITLE_HEIGHT] != identical[:TITLE_HEIGHT]).any()  # the titles


def test_columns_are_named_if_they_hold_one_name_each() -> None:
    header = np.asarray(image_sheet(torch.ones(20, 1, 8, 8), "", digits(20)))[TITLE_HEIGHT:]
    assert header[: TOP - 1 - TITLE_HEIGHT].min() < 128
    assert header[TOP - TITLE_HEIGHT :].min() == 255  # and no image is


def test_else_images_are_named_where_the_name_changes() -> None:
    """In lines of their own above each row of images."""
    names = ["a red cube", "a red cube", "two trees with a long description", "two trees with a long description"]
    picture = np.asarray(image_sheet(torch.ones(4, 1, 64, 64), "", names))
    assert picture.shape == (GAP + TITLE_HEIGHT + TITLE_HEIGHT + 64 + GAP, GAP + 4 * (64 + GAP), 3)
    line = picture[GAP + TITLE_HEIGHT :][:TITLE_HEIGHT]
    darkest = [line[:, GAP + number * (64 + GAP) :][:, :64].min() for number in range(4)]
    assert [bool(value < 128) for value in darkest] == [True, False, True, False]


def test_large_images_are_averaged_down_and_stand_in_fewer_columns() -> None:
    images = torch.zeros(6, 3, 1024, 2048)
    images[0, 0, 0, 0] = torch.nan
    images[1, :, :, :1024] = 1.0
    picture = np.asarray(image_sheet(images, "", [""] * 6))
    assert picture.shape == (TOP + 2 * (256 + GAP), GAP + 5 * (512 + GAP), 3)
    assert picture[TOP, GAP].tolist() == [255, 0, 255]  # one broken pixel in a square of 16
    assert (
        picture[TOP + 9, GAP + 516 + 9].tolist() == [255] * 3
        and picture[TOP + 9, GAP + 516 + 300].tolist() == [128] * 3
    )


def test_each_image_is_written_in_full_size_and_a_video_as_an_animation(tmp_path: Path) -> None:
    images = torch.linspace(-1, 1, 4).view(4, 1, 1, 1).expand(4, 3, 24, 40)
    write_images(images, 1, tmp_path / "images")
    assert sorted(file.name for file in (tmp_path / "images").iterdir()) == [f"000{number}.png" for number in range(4)]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "images" / "0003.png")), np.full((24, 40, 3), 255))
    write_images(images, 2, tmp_path / "videos")
    with Image.open(tmp_path / "videos" / "0001.webp") as video:
        assert (video.size, video.n_frames) == ((40, 24), 2)  # type: ignore[attr-defined]
    assert len(list((tmp_path / "videos").iterdir())) == 2


def test_at_most_a_hundred_images_are_shown() -> None:
    picture = image_sheet(torch.zeros(205, 1, 8, 8), "", digits(205))
    assert picture.size == (GAP + 10 * PITCH, TOP + 10 * PITCH)


def test_written_file_is_complete_and_alone(tmp_path: Path) -> None:
    path = tmp_path / "images" / "grid.png"
    picture = image_sheet(torch.zeros(3, 1, 8, 8), "a title", digits(3))
    for _ in range(2):  # an existing picture is replaced
        save_png(picture, path)
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(picture))
    assert [file.name for file in path.parent.iterdir()] == ["grid.png"]


def test_failed_write_names_the_file_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "images").write_text("a file where a folder should be")
    picture = image_sheet(torch.zeros(1, 1, 8, 8), "", digits(1))
    with pytest.raises(DiskError, match=r"images/grid\.png"):
        save_png(picture, tmp_path / "images" / "grid.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(DiskError, match=r"folder\.png"):
        save_png(picture, tmp_path / "folder.png")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder.png", "images"]
