"""Which file of a component is opened when a variant is asked for: that which diffusers would read."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from qexp.checkpoints.pipeline_folder import PipelineFolder, variant_file
from qexp.errors import LoadError

STEM = "diffusion_pytorch_model"
FOUND = [
    ([f"{STEM}.safetensors", f"{STEM}.fp16.safetensors"], f"{STEM}.fp16.safetensors"),
    (
        [f"{STEM}.safetensors.index.json", f"{STEM}.safetensors.index.fp16.json"],
        f"{STEM}.safetensors.index.fp16.json",
    ),
    (
        [f"{STEM}.safetensors.index.json", f"{STEM}.safetensors.fp16.index.json"],  # of diffusers before 0.32
        f"{STEM}.safetensors.fp16.index.json",
    ),
    (["model.safetensors", "model.safetensors.fp16.index.json"], "model.safetensors.fp16.index.json"),
    ([f"{STEM}.safetensors", f"{STEM}.bf16.safetensors", f"{STEM}.fp16.bin"], None),
]


@pytest.mark.parametrize(("names", "expected"), FOUND)
def test_variant_file_is_that_of_diffusers(names: Sequence[str], expected: str | None, tmp_path: Path) -> None:
    assert variant_file(names, "fp16", "here") == expected
    assert variant_file(names, None, "here") is None
    (tmp_path / "unet").mkdir()
    for name in names:
        (tmp_path / "unet" / name).touch()
    folder = tmp_path / "unet"
    assert PipelineFolder(tmp_path, {}).weights("unet", "fp16") == (folder / expected if expected else folder)


@pytest.mark.parametrize(
    "name",
    [f"{STEM}-00001-of-00002.fp16.safetensors", "model.fp16-00001-of-00002.safetensors", "unet.fp16.safetensors"],
)
def test_variant_files_that_nothing_opens_are_refused(name: str) -> None:
    with pytest.raises(LoadError, match=rf"here has '{name}' of the variant fp16, but none of the files that open"):
        variant_file([f"{STEM}.safetensors", name], "fp16", "here")
