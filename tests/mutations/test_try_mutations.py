"""The script that tries faults, on a made project of one module: what is caught, by which tests, and what is not."""

import subprocess
from pathlib import Path

import mutation_copies
import pytest
from mutation_copies import failure
from try_mutations import Results, chosen, table, try_faults

from tests.mutations.faults import Fault

CODE = "def half(x):\n    return x // 2\n\n\ndef name():\n    return 'half'\n"
TESTS = """
from pathlib import Path

import pytest
import qexp.room.code as code


def test_half_is_that_of_this_copy():
    assert Path(code.__file__).is_relative_to(Path.cwd())
    assert code.half(4) == 2


@pytest.mark.exhaustive
@pytest.mark.parametrize("x", [3, 5])
def test_half_is_rounded_down(x):
    assert code.half(x) == (x - 1) / 2
"""
PROJECT = """
[project]
name = "made"

[tool.pytest.ini_options]
addopts = ["--strict-markers", "--import-mode=importlib"]
pythonpath = ["."]
markers = ["exhaustive: products"]
"""
FILE = "qexp/room/code.py"
CAUGHT = Fault("half-is-a-third", FILE, "x // 2", "x // 3", "Wrong.", first="tests/room/test_code.py")
CAUGHT_BY_ALL = Fault("half-is-not-rounded", FILE, "x // 2", "x / 2", "Wrong.")
NOT_CAUGHT = Fault("half-has-no-name", FILE, "'half'", "''", "Wrong.")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("project")
    packages = {"qexp/__init__.py": "", "qexp/room/__init__.py": ""}
    files = {FILE: CODE, "tests/room/test_code.py": TESTS, "pyproject.toml": PROJECT}
    for name, text in {**packages, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "-c", "user.name=me", "-c", "user.email=me@here", "commit", "-qm", "first")
    return root


@pytest.fixture(autouse=True)
def quick_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of pytest without plugins, whose import takes most of their time."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setattr(mutation_copies, "IN_ONE_PROCESS", "")


def git(root: Path, *arguments: str) -> None:
    subprocess.run(["git", "-C", str(root), *arguments], check=True, capture_output=True)


@pytest.mark.exhaustive
def test_faults_are_caught_by_the_first_tests_that_fail_and_survivors_are_named(project: Path, tmp_path: Path) -> None:
    results = Results(tmp_path / "out.json")
    faults = [CAUGHT, CAUGHT_BY_ALL, NOT_CAUGHT]
    assert try_faults(project, faults, results, jobs=1, timeout_seconds=60) == []
    assert {name: (result.stage, result.test) for name, result in results.by_name.items()} == {
        "half-is-a-third": ("default", "tests/room/test_code.py::test_half_is_that_of_this_copy"),
        "half-is-not-rounded": ("full", "tests/room/test_code.py::test_half_is_rounded_down[3]"),
        "half-has-no-name": ("none", ""),
    }
    assert (project / FILE).read_text() == CODE
    stored = Results(tmp_path / "out.json")
    assert stored.by_name == results.by_name
    assert stored.has(CAUGHT) and not stored.has(Fault("half-is-a-third", FILE, "x // 2", "x // 4", "Wrong."))
    shown = table(faults, results.by_name)
    rounded = "tests/room/test_code.py::test_half_is_rounded_down[3]"
    assert f"| half-is-not-rounded | {FILE} | `{rounded}` (full) |" in shown
    assert shown.endswith("3 faults: 1 caught by the default tests, 1 caught by the full tests, 1 by none.")


def test_tests_that_fail_without_a_fault_judge_none(project: Path) -> None:
    (project / FILE).write_text(CODE.replace("x // 2", "x // 4"))
    results, fault = Results(None), Fault("half-is-half", FILE, "x // 4", "x // 2", "Right.")
    try:
        (problem,) = try_faults(project, [fault], results, jobs=1, timeout_seconds=60)
    finally:
        git(project, "checkout", "-q", ".")
    assert problem == ("half-is-half: tests/room/test_code.py::test_half_is_that_of_this_copy fails without any fault")
    assert results.by_name == {}


@pytest.mark.parametrize(
    ("code", "said", "expected"),
    [
        (0, "", ""),
        (5, "no tests ran", ""),
        (None, "", "no end within 7 s"),
        (-11, "", "pytest ended with signal 11"),
        (3, "INTERNALERROR", "pytest ended with code 3"),
        (1, "FAILED tests/a.py::test_b[x - y z] - assert 1 == 2\n1 failed", "tests/a.py::test_b[x - y z]"),
        (2, "ERROR tests/a.py - ImportError: no\n", "tests/a.py"),
    ],
)
def test_end_of_pytest_in_words(code: int | None, said: str, expected: str) -> None:
    assert failure(code, said, 7) == expected


def test_unknown_names_are_answered_with_the_nearest() -> None:
    assert chosen([CAUGHT, NOT_CAUGHT], [NOT_CAUGHT.name], []) == [NOT_CAUGHT]
    assert chosen([CAUGHT, NOT_CAUGHT], [], ["room"]) == [CAUGHT, NOT_CAUGHT]
    with pytest.raises(SystemExit, match="there is no 'half-is-a-thrd'; did you mean half-is-a-third"):
        chosen([CAUGHT, NOT_CAUGHT], ["half-is-a-thrd"], [])
