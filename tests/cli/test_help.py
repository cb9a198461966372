"""--help is put together from conf/, wherever that is."""

from pathlib import Path

import pytest

from qexp.cli.help import help_text
from qexp.config import yaml_options

REPOSITORY = Path(__file__).parents[2]


def test_help_names_every_option_with_its_description() -> None:
    text = help_text()
    for path in sorted((REPOSITORY / "conf").glob("*/*.yaml")):
        assert f" {path.stem} " in text and yaml_options.description(path) in text
    for example in ("-m backend=none,bitsandbytes,torchao,quanto offload=none,leaf,block", "experiment=backend_pareto"):
        assert f"python -m qexp {example}" in text
    for setting in ("compute_dtype: null", "device: auto", "skip_modules: []", "outputs: outputs", "workers: null"):
        assert setting in text
    assert "hydra.run" not in text and "_target_" not in text
    assert "* bitsandbytes " in text and "* bitsandbytes_fp4" not in text
    assert max(map(len, text.splitlines())) <= 130


def test_an_installed_package_reads_its_own_conf_and_not_a_neighbours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert yaml_options.conf_folder() == REPOSITORY / "conf"
    own, neighbour = tmp_path / "qexp" / "conf", tmp_path / "conf"
    for folder in (own, neighbour):
        folder.mkdir(parents=True)
        (folder / "config.yaml").touch()
    monkeypatch.setattr(yaml_options, "__file__", str(tmp_path / "qexp" / "config" / "yaml_options.py"))
    assert yaml_options.conf_folder() == own
