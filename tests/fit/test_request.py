"""The words of a fit: what they mean, and one clear error for each that is wrong."""

import pytest

from qexp.errors import ConfigError
from qexp.fit.__main__ import main
from qexp.fit.request import read_request

GIB = 1 << 30


def test_words_are_told_from_overrides() -> None:
    found = read_request(
        ["model=digits", "memory=6GiB", "weights=4GB", "seeds=5", "formats=[gguf_q4_0,{backend: gguf}]"]
    )
    assert found.overrides == ("model=digits",)
    assert (found.memory, found.weights, found.seeds) == (6 * GIB, 4 * 10**9, 5)
    assert found.formats is not None and list(found.formats) == ["gguf Q4_0", "gguf Q8_0"]
    assert found.bounds == "memory=6GiB weights=3.72529GiB"


def test_quality_is_a_bound_in_the_direction_of_its_metric() -> None:
    found = read_request(["quality='psnr_db>=40'"]).quality
    assert found is not None and (found.metric.name, found.value) == ("quality/psnr_db", 40)
    assert found.is_reached(40.0) and not found.is_reached(39.9)
    lower = read_request(["quality=kl_divergence<=0.01"]).quality
    assert lower is not None and lower.is_reached(0.01) and not lower.is_reached(0.011)


def test_rate_is_bytes_a_second() -> None:
    assert read_request(["memory=1GiB", "step_ms=80", "bandwidth=20GB/s"]).bandwidth == 20 * 10**9


WRONG = {
    ("model=digits",): "there is no bound to fit",
    ("memory=6",): "memory=6 has no unit; write memory=6GiB",
    ("memory=0GiB",): "memory=0GiB must be above 0",
    ("memory=much",): "memory=much is not a size",
    ("bits=0",): "bits=0 must be a number above 0",
    ("bits=nan",): "bits=nan must be a number above 0",
    ("bits=4", "weights=1GiB"): "give one of them",
    ("bits=4", "bits=5"): "bits= is given twice",
    ("memory=",): "memory= has no value",
    ("step_ms=80", "bits=4"): "add memory=",
    ("bits=4", "bandwidth=1GB"): "add step_ms=",
    ("bits=4", "activations=1GiB"): "add memory=",
    ("quality=psnr_db>=40", "memory=1GiB", "step_ms=9"): "give one of them",
    ("quality=psnr>=40",): "the metric 'psnr' is unknown",
    ("quality=psnr_db<=40",): "write psnr_db>=",
    ("quality=psnr_db>=high",): "'high' is no number",
    ("quality=40",): "is no bound on a metric",
    ("bits=4", "formats=[gguf_q9]"): r"formats\[0\]=gguf_q9 is no format",
    ("bits=4", "formats=gguf"): "must be a list of backends",
    ("bits=4", "formats=[mixed]"): "is no format",
    ("bits=4", "scores=nowhere"): "scores=nowhere is no folder",
    ("bits=4", "seeds=0"): "seeds=0 must be a whole number, 1 or more",
    ("bits=4", "score=fast"): "score=fast is unknown",
    ("bits=4", "backend=gguf"): "fit chooses the backend",
    ("bits=4", "offload=leaf"): "fit decides where layers rest",
    ("bits=4", "device_map=auto"): "fit decides where layers rest",
    ("bits=4", "sweep.name=x"): "names its own sweep",
    ("bits=4", "save.push_to_hub=me/model"): "push the recommended one with the command line",
    ("bits=4", "save={path: x, push_to_hub: me/model}"): "push the recommended one with the command line",
}


@pytest.mark.parametrize("words", WRONG, ids=" ".join)
def test_wrong_words_are_one_error_with_the_remedy(words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=WRONG[words].replace("(", r"\(")):
        read_request(words)


def test_errors_are_one_line_and_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model=digits", "memory=6"]) == 1
    assert capsys.readouterr().err.splitlines() == ["error: memory=6 has no unit; write memory=6GiB, or MiB or GB"]
