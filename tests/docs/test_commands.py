"""Every `python -m qexp` command of README.md, docs/ and conf/: its groups, options and fields exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from qexp.cli.commands import COMMANDS
from tests.composing import composed

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
COMMAND = re.compile(r"^(?:\$ )?python -m qexp ((?:.*\\\n)*.+)", re.MULTILINE)
COMMENT = re.compile(r"^# python -m qexp (\S.*?)(?:   .*)?$", re.MULTILINE)
GROUP = re.compile(r"[+~]*(\w+)")  # the first part of an override's name
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
    """Compose every command, several in one composition; if that fails, each alone, to name the one that does not."""
    commands = [(path, words) for path in paths for words in commands_of(path) if is_experiment(words)]
    for batch in together([first_of_a_sweep(words) for _, words in commands]):
        try:
            composed(*batch)
        except Exception as error:
            for path, words in commands:
                if set(first_of_a_sweep(words)) <= set(batch):
                    compose_one(path, words)
            pytest.fail(f"{batch}\n{error}", pytrace=False)


def is_experiment(words: list[str]) -> bool:
    is_flag = words[0].startswith("-") and words[0] != "-m"
    return not is_flag and not ADDED & {word.partition("=")[2] for word in words}


def compose_one(path: Path, words: list[str]) -> None:
    try:
        composed(*first_of_a_sweep(words))
    except Exception as error:
        pytest.fail(f"{path.name}: python -m qexp {shlex.join(words)}\n{error}", pytrace=False)


def together(commands: list[list[str]]) -> list[list[str]]:
    """Join commands that set different groups, or the same one alike: a composition checks them as it would alone.

    A preset sets whatever it likes: it stays alone.
    """
    batches: list[dict[str, list[str]]] = []  # overrides of each group
    for overrides in commands:
        groups: dict[str, list[str]] = {}
        for override in overrides:
            groups.setdefault(GROUP.match(override)[1], []).append(override)
        fitting = (
            batch
            for batch in batches
            if "experiment" not in batch.keys() | groups
            and all(batch.get(name, own) == own for name, own in groups.items())
        )
        if (batch := next(fitting, None)) is None:
            batches.append(groups)
        else:
            batch.update(groups)
    return [[override for own in batch.values() for override in own] for batch in batches]


def test_a_command_with_a_wrong_field_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("```\npython -m qexp -m backend=none,torchao offload.wrong=1\n```\n")
    with pytest.raises(pytest.fail.Exception, match=r"page.md: .* offload\.wrong"):
        compose_all(tmp_path / "page.md")


def test_commands_are_joined_unless_they_set_a_group_differently() -> None:
    commands = [["backend=a", "backend.x=1"], ["+backend@components.b=c"], ["offload=d"], ["experiment=e"], ["seed=1"]]
    commands += [["backend=a", "backend.x=1", "task=f"], ["backend=a", "seed=1"]]
    joined = [["backend=a", "backend.x=1", "offload=d", "seed=1", "task=f"], ["+backend@components.b=c"]]
    assert together(commands) == [*joined, ["experiment=e"], ["backend=a", "seed=1"]]
