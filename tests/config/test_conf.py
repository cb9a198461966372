"""conf/: every yaml composes, says what it is, and survives the way to YAML and back; every field can be overridden."""

import dataclasses
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from qexp.config.hydra_schema import compose_settings
from qexp.config.plugins import plugin_names
from qexp.config.schema import RunConfig, TopLevelConfig
from qexp.config.yaml_options import option_names, options_of_plugin
from qexp.experiments.resolve import to_run_config
from qexp.experiments.stored import run_config_from_container
from qexp.models.arithmetic import ASSETS
from tests.assigning import assigned, run_config
from tests.composing import CONF
from tests.products import representatives

HELD_OUT = ASSETS / "held_out.txt"
RECIPE = "[{modules: blocks.0, backend: gguf}, {backend: quanto_int4}]"
OF_LANGUAGE = ("model.path=/models/tiny", "task.prompt=[a,b]")
COMPOSITIONS = [  # every option but backends once, with what it does not go without
    ("offload=block", "metrics=perceptual", "tracking=none", "isolation=inline", "sweep=default", "task=generate"),
    ("model=digits", "offload=leaf", "metrics=default", "tracking=offline", "isolation=process", "task=sensitivity",
     "offload.strategy=none"),
    ("model=causal_lm", *OF_LANGUAGE, "offload=model", "tracking=online"),
    ("model=seq2seq", *OF_LANGUAGE, "offload=sequential"),
    ("model=transformers", "model.path=/models/tiny", "task=roundtrip", "offload=none"),
    ("model=python", "model.factory=tests.backends:Stack", "model.checkpoint=/models/tiny", "task=roundtrip"),
    ("model=arithmetic", "task=perplexity"),
    ("model=arithmetic", "task=lm_eval", "task.tasks=[a]"),
    ("model=arithmetic", "task=forward", f"task.inputs={HELD_OUT}"),
    ("experiment=backend_pareto",), ("experiment=mixed_pareto",), ("experiment=roundtrip_all",),
]  # fmt: skip
OF_PIPELINES = [f"model={name}" for name in options_of_plugin("model", "diffusers")]  # see test_presets.py
OPTIONS = {f"{path.parent.name}={path.stem}" for path in sorted(CONF.glob("*/*.yaml"))}
if not find_spec("lm_eval"):  # says so where its library is not installed
    COMPOSITIONS = [options for options in COMPOSITIONS if "task=lm_eval" not in options]
    OPTIONS -= {"task=lm_eval"}


def assert_survives_yaml_and_json(config: RunConfig) -> None:
    container = config.to_container()
    assert run_config_from_container(yaml.safe_load(yaml.safe_dump(container))) == config
    assert run_config_from_container(json.loads(json.dumps(container))) == config


def test_every_option_has_a_test() -> None:
    composed_here = {option for options in COMPOSITIONS for option in options}
    of_others = {*OF_PIPELINES, "experiment=flux_dev_16gb", *(f"backend={name}" for name in option_names("backend"))}
    assert OPTIONS - of_others <= composed_here


@pytest.mark.parametrize("options", COMPOSITIONS, ids=" ".join)
def test_every_yaml_composes_and_survives_the_way_through_yaml_and_json(options: tuple[str, ...]) -> None:
    assert_survives_yaml_and_json(run_config(*options))


def test_every_backends_yaml_composes_and_survives_the_way_through_yaml_and_json() -> None:
    """All of them in one composition, each in the place of a component, and then in the place of all components."""
    names = option_names("backend")
    places = [f"+backend@components.{name}.backend={name}" for name in names]
    components = assigned(*places, f"components.mixed.backend.recipe={RECIPE}").components
    for name in names:
        cfg = assigned()
        cfg.backend = components[name].backend
        config = to_run_config(cfg)
        assert_survives_yaml_and_json(config)
        backend = config.components["transformer"].backend
        assert name.startswith(backend.quant_method.removeprefix("qexp_")), name
        assert backend.label and dataclasses.is_dataclass(backend)


@pytest.mark.parametrize("path", sorted(CONF.glob("**/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_yaml_opens_with_what_it_is_a_command_and_what_to_expect(path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("# @")]
    comment = lines[: next(number for number, line in enumerate(lines) if not line.startswith("#"))]
    assert comment[0].endswith((".", "?"))
    assert any("python -m " in line for line in comment)
    assert any(line.startswith("# Expect ") for line in comment)


@pytest.mark.parametrize("path", sorted(CONF.glob("experiment/*.yaml")), ids=lambda path: path.stem)
def test_what_a_preset_chooses_wins_over_the_defaults(path: Path) -> None:
    """Also of Hydra's own groups: mixed_pareto has a sweeper of its own."""
    chosen = [entry for entry in yaml.safe_load(path.read_text()).get("defaults", []) if isinstance(entry, dict)]
    choices = {name.removeprefix("override ").lstrip("/"): option for entry in chosen for name, option in entry.items()}
    found = compose_settings([f"experiment={path.stem}"], with_hydra=True).hydra.runtime.choices
    assert choices and {name: found[name] for name in choices} == choices


def test_every_backend_model_and_task_has_a_yaml_and_a_schema_of_its_own() -> None:
    for group in ("backend", "model", "task"):
        inherited = {
            line.split("@")[0].split("/")[-1]
            for path in (CONF / group).glob("*.yaml")
            for line in path.read_text().splitlines()
            if line.startswith(f"defaults: [/schema/{group}/")
        }
        assert inherited == set(plugin_names(group))


def test_composition_that_is_changed_leaves_the_next_one_as_it_was() -> None:
    """All of them take their schemas from one store, which is not copied."""
    first = compose_settings(["backend=gguf"])
    expected = OmegaConf.to_container(first)
    first.backend.quant_type, first.loader.workers, first.paths.outputs = "Q4_0", 9, "elsewhere"
    assert OmegaConf.to_container(compose_settings(["backend=gguf"])) == expected


def test_config_yaml_repeats_the_defaults_of_the_dataclass() -> None:
    config = assigned()
    groups = {"model", "backend", "task", "sweep"}  # None in the dataclass, or given by now
    for name, value in dataclasses.asdict(TopLevelConfig()).items():
        if name not in groups:
            plain = config[name]
            plain = OmegaConf.to_container(plain) if OmegaConf.is_config(plain) else plain
            assert plain == json.loads(json.dumps(value)), name


def sample(hint: Any, default: Any) -> Any:
    """A value of the type that is not the default."""
    text = str(hint)
    if "dict" in text:
        return {"a": "x" if text.endswith("str]") else 1}
    if "bool" in text:
        return not default
    if "int" in text:
        return 7
    if "float" in text:
        return 0.25
    return ["a", "b"] if "tuple" in text else "other"


PLAIN = str.maketrans("", "", " '")  # as the command line writes lists and groups
FIELD_PLACES = [
    *[(f"backend={option}", "backend") for option in ("none", "bitsandbytes", "torchao", "quanto", "gguf")],
    *[(f"task={option}", "task") for option in plugin_names("task")],
    *[(f"{group}=none", group) for group in ("offload", "tracking")],
    *[(f"model={option}", "model") for option in plugin_names("model")],
    ("metrics=default", "metrics"),
    ("isolation=process", "isolation"),
    ("sweep=default", "sweep"),
    ("seed=1", "loader"),
    ("seed=1", "reference"),
    ("seed=1", "paths"),
    ("seed=1", "save"),
]


@pytest.mark.parametrize(("option", "place"), representatives(FIELD_PLACES, [*FIELD_PLACES][::3]), ids=str)
def test_every_field_of_every_group_can_be_overridden(option: str, place: str) -> None:
    before = assigned(option)[place]
    cls: Any = OmegaConf.get_type(before)
    samples = {item.name: sample(item.type, before[item.name]) for item in dataclasses.fields(cls)}
    overrides = [
        f"{'+' if isinstance(value, dict) else ''}{place}.{name}={str(value).translate(PLAIN)}"
        for name, value in samples.items()
    ]
    after = OmegaConf.to_container(assigned(option, *overrides)[place])
    assert after == samples


def test_labels_follow_the_type_that_is_quantized_to() -> None:
    assert (
        run_config("backend=torchao", "backend.quant_type=int8dq").components["transformer"].backend.label == "int8dq"
    )
    assert run_config("backend=bitsandbytes_nf4_dq").components["transformer"].backend.label == "nf4+dq"
