"""Images that a pipeline replaced are no match: not counted as identical, nor compared."""

import pytest
import torch

from qexp.scoring.detected import shown_images
from tests.metrics.test_images import compare_images, psnr_db

FLAGS: dict[str, tuple[list[bool], list[bool], list[bool]]] = {  # this run, the reference, which images are compared
    "all": ([True, True], [True, True], [False, False]),
    "one": ([True, False], [True, False], [False, True]),
    "different ones": ([True, False], [False, True], [False, False]),
    "of the reference alone": ([False, False], [False, True], [True, False]),
    "none": ([False, False], [False, False], [True, True]),
}


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("case", FLAGS)
def test_replaced_images_are_no_match(case: str, frames: int, capsys: pytest.CaptureFixture[str]) -> None:
    ours, theirs, compared = FLAGS[case]
    torch.manual_seed(0)
    images = torch.rand(2 * frames, 3, 16, 16)
    outputs = {"images": images, "nsfw_content_detected": torch.tensor(ours)}
    expected = {"images": images + 0.1, "nsfw_content_detected": torch.tensor(theirs)}
    shown, detected = shown_images(outputs, expected)
    assert detected == {"nsfw_content_detected": sum(ours)}
    assert shown.tolist() == [one for one in compared for _ in range(frames)]
    said = capsys.readouterr().err
    assert said.count("are black in place of what was generated (nsfw_content_detected)") == any(ours) + any(theirs)
    is_complete = bool(shown.all())
    numbers = compare_images(images[shown], images[shown], is_complete=is_complete)
    assert numbers["exact"] == float(all(compared))
    found = compare_images(outputs["images"][shown], expected["images"][shown], is_complete=is_complete)
    assert any(compared) or set(found.values()) == {None, 0.0}
    apart = found["psnr_db"]
    # the same error everywhere: 10 log10(2^2 / 0.1^2) = 26.02 dB
    assert apart == pytest.approx(26.0206, abs=1e-3) if any(compared) else apart is None
    assert not any(compared) or apart == psnr_db(images[shown], expected["images"][shown])


def test_pipeline_that_says_nothing_has_no_numbers_of_it() -> None:
    shown, detected = shown_images({"images": torch.zeros(2, 3, 4, 4), "labels": torch.arange(2)}, None)
    assert detected == {} and shown.all()
