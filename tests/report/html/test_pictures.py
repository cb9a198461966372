"""Pictures of runs: the gain of a run's own sheets, the middle frame of videos, identical and replaced ones."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qexp.report.html.pictures import RunImages, amplified_difference, encode, make_album, open_outputs
from qexp.results.numbers import difference_gain
from tests.report.html.made_sweeps import save_images, scene


def run_of(folder: Path, images: Any, reference: Any | None = None, number: int = 0, **others: Any) -> RunImages:
    save_images(folder / f"run{number}", images, **others)
    expected = None
    if reference is not None:
        save_images(folder / "reference", reference)
        expected = open_outputs(folder / "reference")
    outputs = open_outputs(folder / f"run{number}")
    assert outputs is not None
    return RunImages(number, number, "0", outputs, expected, "key" if expected else "", None)


def decoded(url: str) -> Any:
    picture = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    assert picture.format == "WEBP"
    return np.asarray(picture.convert("RGB"))


def test_gain_is_that_of_the_sheets_of_a_run() -> None:
    for scale in (2.0, 0.3, 0.004, 1e-7):
        ours = np.random.default_rng(0).uniform(-1, 1, (16, 16, 3)).astype(np.float32)
        theirs = ours + np.random.default_rng(1).uniform(-scale, scale, ours.shape).astype(np.float32)
        picture, gain = amplified_difference(ours, theirs, 512)
        assert gain == difference_gain(np.abs(ours - theirs))
        assert np.asarray(picture).max() > 120 or gain == 2**20  # something is seen


def test_small_images_are_stored_without_loss(tmp_path: Path) -> None:
    images = np.stack([scene(8, 0), scene(8, 1)])
    album = make_album([run_of(tmp_path, images, -images)])
    shown = decoded(album["images"][album["shots"][1]["image"]])
    assert (shown == np.rint((images[1].transpose(1, 2, 0) + 1) / 2 * 255)).all()
    assert album["samples"][1]["name"] == "image 1: label 1"


def test_large_images_are_shrunk_and_the_note_says_so(tmp_path: Path) -> None:
    album = make_album([run_of(tmp_path, scene(700, 0)[None], scene(700, 1)[None])])
    assert decoded(album["images"][0]).shape == (512, 512, 3)
    assert "at most 512 pixels a side (they have 700 × 700)" in album["note"]
    assert album["samples"][0]["width"] == 700


def test_runs_share_the_picture_of_their_reference(tmp_path: Path) -> None:
    reference = scene(16, 0)[None]
    runs = [run_of(tmp_path, np.clip(reference * (1 - 0.1 * number), -1, 1), reference, number) for number in (1, 2)]
    album = make_album(runs)
    assert len(album["samples"]) == 1
    assert len(album["images"]) == 1 + 2 * 2
    assert [shot["run"] for shot in album["shots"]] == [1, 2]


def test_identical_images_have_no_difference(tmp_path: Path) -> None:
    image = scene(16, 0)[None]
    (shot,) = make_album([run_of(tmp_path, image, image)])["shots"]
    assert shot["is_identical"] and shot["difference"] is None and shot["image"] == 0


def test_a_run_without_its_reference_is_shown_alone(tmp_path: Path) -> None:
    album = make_album([run_of(tmp_path, scene(16, 0)[None])])
    assert album["samples"][0]["reference"] is None
    assert album["shots"][0]["difference"] is None
    assert "1 runs have no reference here" in album["note"]


def test_of_a_video_its_middle_frame(tmp_path: Path) -> None:
    frames = np.stack([np.full((1, 4, 4), value, np.float32) for value in (-1, -0.5, 0, 0.5, 1, -1)])
    run = run_of(tmp_path, frames, None, latents=np.zeros((2, 1), np.float32))
    assert (run.outputs.frames, run.outputs.samples) == (3, 2)
    assert run.outputs.read(0)[0, 0, 0] == -0.5
    assert run.outputs.read(1)[0, 0, 0] == 1
    assert run.name_of(1).startswith("video 1")


def test_what_a_safety_checker_replaced_is_marked(tmp_path: Path) -> None:
    images = np.stack([scene(16, 0), np.full((3, 16, 16), -1, np.float32)])
    flags = np.array([False, True])
    album = make_album([run_of(tmp_path, images, np.stack([scene(16, 2), scene(16, 3)]), nsfw_content_detected=flags)])
    assert [shot["is_replaced"] for shot in album["shots"]] == [False, True]


def test_values_that_are_not_finite_are_magenta() -> None:
    pixels = np.zeros((8, 8, 1), np.float32)
    pixels[2, 3] = np.nan
    shown = np.asarray(Image.open(io.BytesIO(encode(pixels, 512))).convert("RGB"))
    assert shown[2, 3].tolist() == [255, 0, 255]
    assert shown[0, 0].tolist() == [128, 128, 128]


def test_every_run_has_a_picture_before_any_has_two(tmp_path: Path) -> None:
    reference = np.stack([scene(64, number) for number in range(4)])
    runs = [run_of(tmp_path, np.clip(reference + 0.1 * number, -1, 1), reference, number) for number in (1, 2, 3)]
    whole = sum(len(url) for url in make_album(runs)["images"])
    album = make_album(runs, budget=whole // 3)
    assert {shot["run"] for shot in album["shots"] if shot["sample"] == 0} == {1, 2, 3}
    assert 3 <= len(album["shots"]) < 12
    assert f"{len(album['shots'])} of 12 images are in this page" in album["note"]


def test_as_many_pairs_as_are_wanted_fit_into_the_budget(tmp_path: Path) -> None:
    reference = np.stack([scene(160, number) for number in range(8)])
    noise = np.random.default_rng(0).normal(0, 0.1, reference.shape)
    images = [np.clip(reference + number * noise, -1, 1).astype(np.float32) for number in range(6)]
    runs = [run_of(tmp_path, image, reference, number) for number, image in enumerate(images)]
    budget = sum(len(url) for url in make_album(runs)["images"]) // 2
    album = make_album(runs, budget=budget)
    assert len(album["shots"]) >= 40
    assert sum(len(url) for url in album["images"]) * 3 / 4 < 1.05 * budget
