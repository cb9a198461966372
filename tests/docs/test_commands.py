"""Every `python -m qexp` command of README.md, docs/ and conf/: its groups, options and fields exist."""

import re
import shlex
from copy import deepcopy
from pathlib import Path

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from qexp.cli.commands import COMMANDS
from qexp.config.yaml_options import group_names
from tests.composing import composed

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
COMMAND = re.compile(r"^(?:\$ )?python -m qexp ((?:.*\\\n)*.+)", re.MULTILINE)
COMMENT = re.compile(r"^# python -m qexp (\S.*?)(?:   .*)?$", re.MULTILINE)
GROUP = re.compile(r"[+~]*(\w+)(?:@(\w+))?")  # the first parts of an override's name and of its package
ADDED = {"rowwise", "generator"}  # the backend and the model source that CONTRIBUTING.md adds


def commands_of(path: Path) -> list[list[str]]:
    pattern = COMMENT if path.suffix == ".yaml" else COMMAND
    found = [shlex.split(line.replace("\\\n", ""), comments=True) for line in pattern.findall(path.read_text())]
    return [words for words in found if words[0] not in COMMANDS and not words[0].startswith("<")]


def first_of_a_sweep(words: list[str]) -> list[str]:
    """The overrides of the first experiment."""
    overrides = [word for word in words if word not in ("-m", "--multirun", "...")]
    parsed = OverridesParser.create().parse_overrides(overrides)
    return [str(one) for one in BasicSweeper.split_arguments(parsed, None)[0][0]]


def test_commands_of_pages_and_in_the_comments_of_conf_compose() -> None:
    options = sorted(ROOT.glob("conf/**/*.yaml"))
    for paths in (PAGES, options):
        assert sum(len(commands_of(path)) for path in paths) > 60
    compose_all(*PAGES, *options)


def compose_all(*paths: Path) -> None:
    """Compose the options of several commands at once and assign the values of each; name the one that fails."""
    commands = [(path, words) for path in paths for words in commands_of(path) if is_experiment(words)]
    for options, batch in together([first_of_a_sweep(words) for _, words in commands]):
        try:
            cfg = composed(*options)
            for overrides in batch:
                values = OverridesParser.create().parse_overrides([one for one in overrides if one not in options])
                ConfigLoaderImpl._apply_overrides_to_config(values, deepcopy(cfg))
        except Exception as error:
            for path, words in commands:
                if first_of_a_sweep(words) in batch:
                    compose_one(path, words)
            pytest.fail(f"{options} {batch}\n{error}", pytrace=False)


def is_experiment(words: list[str]) -> bool:
    is_flag = words[0].startswith("-") and words[0] != "-m"
    return not is_flag and not ADDED & {word.partition("=")[2] for word in words}


def compose_one(path: Path, words: list[str]) -> None:
    try:
        composed(*first_of_a_sweep(words))
    except Exception as error:
        pytest.fail(f"{path.name}: python -m qexp {shlex.join(words)}\n{error}", pytrace=False)


def together(commands: list[list[str]]) -> list[tuple[list[str], list[list[str]]]]:
    """Return commands with the options that they are composed with: their own, and those of others in groups that they
    do not name, so that their values meet the same fields as alone.

    A preset sets whatever it likes: it stays alone.
    """
    batches: list[tuple[dict[str, set[str]], list[list[str]]]] = []  # options of each group; commands
    for overrides in commands:
        groups: dict[str, set[str]] = {}
        for override in overrides:
            for name in filter(None, GROUP.findall(override)[0]):
                groups.setdefault(name, set()).update({override} if is_option(override) else ())
        fitting = (
            batch
            for batch in batches
            if batch[0] == groups
            or (
                "experiment" not in batch[0].keys() | groups
                and all(batch[0].get(name, own) == own for name, own in groups.items())
            )
        )
        if (batch := next(fitting, None)) is None:
            batches.append(batch := ({}, []))
        batch[0].update(groups)
        batch[1].append(overrides)
    return [(sorted(set().union(*groups.values())), own) for groups, own in batches]


def is_option(override: str) -> bool:
    """Whether it is part of what is composed, and no value that is assigned; a sweeper's fields are composed too."""
    group, _, field = override.lstrip("+~").partition("=")[0].partition("@")[0].partition(".")
    return group == "hydra" or (group in group_names() and not field)


def test_a_command_with_a_wrong_field_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("```\npython -m qexp -m backend=none,torchao offload.wrong=1\n```\n")
    with pytest.raises(pytest.fail.Exception, match=r"page.md: .* offload\.wrong"):
        compose_all(tmp_path / "page.md")


def test_commands_are_joined_unless_they_set_a_group_differently() -> None:
    first, second = ["backend=quanto", "backend.x=1"], ["backend=quanto", "backend.x=2", "task=roundtrip"]
    component, default = ["+backend@components.b.backend=none"], ["components.b.backend.x=1", "seed=1"]
    preset, values = ["experiment=roundtrip_all", "seed=1"], ["experiment=roundtrip_all", "seed=2"]
    commands = [first, component, ["offload=leaf", "seed=1"], preset, default, second, values, ["backend.x=3"]]
    assert together(commands) == [
        (["backend=quanto", "offload=leaf", "task=roundtrip"], [first, ["offload=leaf", "seed=1"], default, second]),
        (component, [component]),
        (["experiment=roundtrip_all"], [preset, values]),
        ([], [["backend.x=3"]]),
    ]
