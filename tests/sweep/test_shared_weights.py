"""When the experiments of a sweep keep quantized weights for each other."""

from dataclasses import replace
from pathlib import Path

import pytest

from qexp.config.schema import LoaderConfig
from qexp.sweep.shared_weights import with_cache_folder
from tests.sweep.settings import run_config

SHARED: tuple[list[str], ...] = (
    ["seed"],
    ["backend", "offload"],
    ["task.prompt"],
    ["model", "task"],
    ["reference.dtype"],
)
ALONE: tuple[list[str], ...] = (
    [], ["backend"], ["model.path", "backend.quant_type"], ["skip_modules"], ["experiment"],
    ["+backend@components.vae.backend"], ["+components.vae.compute_dtype"], ["device_map"],
)  # fmt: skip


@pytest.mark.parametrize("varying", SHARED)
def test_experiments_with_the_same_weights_share_a_folder(varying: list[str], tmp_path: Path) -> None:
    found = with_cache_folder(run_config(tmp_path), varying)
    assert found.loader.cache == str(tmp_path / "outputs/quantized")


@pytest.mark.parametrize("varying", ALONE)
def test_experiments_with_weights_of_their_own_keep_none(varying: list[str], tmp_path: Path) -> None:
    assert with_cache_folder(run_config(tmp_path), varying).loader.cache is None


@pytest.mark.parametrize("cache", [None, "/elsewhere"])
def test_what_is_asked_for_stays(cache: str | None, tmp_path: Path) -> None:
    config = replace(run_config(tmp_path), loader=LoaderConfig(cache=cache))
    assert with_cache_folder(config, ["seed"]) == config
