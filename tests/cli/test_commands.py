"""`qexp report` and the other commands: the same programs as `python -m qexp.report`."""

import importlib
import sys

import pytest

import qexp.__main__
from qexp.cli.commands import COMMANDS
from qexp.cli.help import help_text
from qexp.system.program_name import program_name


@pytest.mark.parametrize(
    ("program", "typed"), [("/usr/bin/qexp", "qexp"), ("/somewhere/qexp/__main__.py", "python -m qexp")]
)
@pytest.mark.parametrize("name", COMMANDS)
def test_command_runs_its_own_program_and_calls_it_as_it_was_typed(
    name: str, program: str, typed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [program, name, "--help"])
    with pytest.raises(SystemExit) as ended:
        qexp.__main__.main()
    assert ended.value.code == 0
    assert f"usage: {typed} {name} " in capsys.readouterr().out
    assert f"python -m qexp {name}" in help_text()


@pytest.mark.parametrize("name", COMMANDS)
def test_command_gets_the_arguments_behind_it_and_its_exit_code_is_returned(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(importlib.import_module(COMMANDS[name]), "main", lambda: seen.append(sys.argv[1:]) or 3)
    monkeypatch.setattr(sys, "argv", ["qexp", name, "a", "--b"])
    with pytest.raises(SystemExit) as ended:
        qexp.__main__.main()
    assert (seen, ended.value.code) == ([["a", "--b"]], 3)


@pytest.mark.parametrize("name", COMMANDS)
def test_module_of_a_command_is_called_as_it_was_typed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/qexp/module.py"])
    assert program_name(name) == f"python -m qexp.{name}"


@pytest.mark.parametrize("arguments", [["--version"], ["seed=1", "--version"], ["--version", "-m"]])
def test_version_is_that_of_this_program(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["qexp", *arguments])
    qexp.__main__.main()
    assert capsys.readouterr().out == f"qexp {qexp.__version__}\n"


def test_completion_proposes_options(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    line = "qexp offload=l"
    monkeypatch.setenv("COMP_LINE", line)
    monkeypatch.setenv("COMP_POINT", str(len(line)))
    monkeypatch.setattr(sys, "argv", ["qexp", "-sc", "query=bash"])
    with pytest.raises(SystemExit):
        qexp.__main__.main()
    assert "offload=leaf" in capsys.readouterr().out
