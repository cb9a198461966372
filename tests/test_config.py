"""The composed configuration: every yaml and field, every message of `to_run_config`, the way to YAML and back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from qexp import devices
from qexp.config import RunConfig, plugin_names, run_config_from_container, to_run_config
from qexp.errors import QexpError
from qexp.schema import register_schemas
from qexp.settings import TopLevelConfig

CONF = Path(__file__).parents[1] / "conf"
OPTIONS = [f"{path.parent.name}={path.stem}" for path in sorted(CONF.glob("*/*.yaml"))]


@pytest.fixture(autouse=True, scope="module")
def hydra_at_conf() -> Iterator[None]:
    register_schemas()
    with initialize_config_dir(str(CONF), version_base="1.3", job_name="qexp"):
        yield


@pytest.fixture(autouse=True)
def machine_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "cuda_device_count", lambda: 0)


def run_config(*overrides: str) -> RunConfig:
    return to_run_config(compose("config", overrides=list(overrides)))


def message_of(*overrides: str) -> str:
    with pytest.raises(QexpError) as caught:
        run_config(*overrides)
    return str(caught.value)


@pytest.mark.parametrize("option", OPTIONS)
def test_every_yaml_composes_and_survives_the_way_through_yaml_and_json(option: str) -> None:
    config = run_config(option)
    container = config.to_container()
    assert run_config_from_container(yaml.safe_load(yaml.safe_dump(container))) == config
    assert run_config_from_container(json.loads(json.dumps(container))) == config
    group, name = option.split("=")
    if group == "backend":
        backend = config.components["transformer"].backend
        assert name.startswith(backend.quant_method)
        assert backend.label and dataclasses.is_dataclass(backend)


@pytest.mark.parametrize("path", sorted(CONF.glob("**/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_yaml_opens_with_what_it_is_a_command_and_what_to_expect(path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("# @")]
    comment = lines[: next(number for number, line in enumerate(lines) if not line.startswith("#"))]
    assert comment[0].endswith((".", "?"))
    assert any("python -m " in line for line in comment)
    assert any(line.startswith("# Expect ") for line in comment)


def test_every_backend_model_and_task_has_a_yaml_and_a_schema_of_its_own() -> None:
    for group in ("backend", "model", "task"):
        inherited = {
            line.split("@")[0].split("/")[-1]
            for path in (CONF / group).glob("*.yaml")
            for line in path.read_text().splitlines()
            if line.startswith(f"defaults: [/schema/{group}/")
        }
        assert inherited == set(plugin_names(group))


def test_defaults_are_nf4_generate_resident_on_the_cpu() -> None:
    config = run_config()
    transformer = config.components["transformer"]
    assert (transformer.backend.quant_method, transformer.backend.bnb_4bit_quant_type) == ("bitsandbytes", "nf4")
    assert transformer.skip_modules == ("proj_out", "x_embed")
    assert (config.task.name, config.offload.strategy, config.device) == ("generate", "none", "cpu")


def test_config_yaml_repeats_the_defaults_of_the_dataclass() -> None:
    composed = compose("config")
    groups = {"model", "backend", "task", "sweep"}  # None in the dataclass, or given by now
    for name, value in dataclasses.asdict(TopLevelConfig()).items():
        if name not in groups:
            plain = composed[name]
            plain = OmegaConf.to_container(plain) if OmegaConf.is_config(plain) else plain
            assert plain == json.loads(json.dumps(value)), name
