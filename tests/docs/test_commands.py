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


@pytest.mark.parametrize("path", [path for path in PAGES if commands_of(path)], ids=lambda path: path.name)
def test_commands_of_a_page_compose(path: Path) -> None:
    compose_all(path)


def test_commands_in_the_comments_of_conf_compose() -> None:
    paths = sorted(ROOT.glob("conf/**/*.yaml"))
    assert sum(len(commands_of(path)) for path in paths) > 60
    for path in paths:
        compose_all(path)


def compose_all(path: Path) -> None:
    for words in commands_of(path):
        if (words[0].startswith("-") and words[0] != "-m") or ADDED & {word.partition("=")[2] for word in words}:
            continue
        try:
            composed(*first_of_a_sweep(words))
        except Exception as error:
            pytest.fail(f"{path.name}: python -m qexp {shlex.join(words)}\n{error}", pytrace=False)


def test_a_command_with_a_wrong_field_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("```\npython -m qexp -m backend=none,torchao offload.wrong=1\n```\n")
    with pytest.raises(pytest.fail.Exception, match=r"offload\.wrong"):
        compose_all(tmp_path / "page.md")
