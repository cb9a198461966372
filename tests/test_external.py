"""Tests marked `external`: skipped where their program is missing, but not in CI, which has to install it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = """
import shutil
import pytest

def look_for_it():
    if shutil.which("program-that-is-not-there") is None:
        pytest.skip("program-that-is-not-there is missing")

@pytest.fixture
def program():
    look_for_it()

@pytest.mark.external
def test_in_its_body():
    look_for_it()

@pytest.mark.external
def test_in_a_fixture(program):
    pass

@pytest.mark.external
@pytest.mark.skipif(True, reason="program-that-is-not-there is missing")
def test_by_a_mark():
    pass

def test_not_external():
    pytest.skip("no need of it")

@pytest.mark.external
@pytest.mark.xfail(reason="a defect of the program")
def test_expected_failure():
    assert False
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with the project's settings and rules, and tests that skip."""
    (tmp_path / "tests").mkdir()
    for name in ("pyproject.toml", "tests/conftest.py", "tests/own_process.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "tests" / "test_made.py").write_text(CODE)
    return tmp_path


IN_CI = {"failed": 1, "errors": 2, "skipped": 1, "xfailed": 1}  # a skip in a fixture or by a mark is an error
ELSEWHERE = {"skipped": 4, "xfailed": 1}


@pytest.mark.parametrize(("ci", "expected"), [("true", IN_CI), ("1", ELSEWHERE), ("", ELSEWHERE)])
def test_skipped_external_test_is_a_failure_in_ci_alone(ci: str, expected: dict[str, int], project: Path) -> None:
    command = [sys.executable, "-m", "pytest", "tests/test_made.py", "-m", "", "-p", "no:cacheprovider"]
    environment = {**os.environ, "CI": ci}
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (\w+)", done.stdout.splitlines()[-1])}
    assert counts == expected, done.stdout + done.stderr
    assert done.returncode == (1 if ci == "true" else 0)
    reason = "^E? *an external test was skipped in CI: Skipped: program-that-is-not-there is missing$"
    assert len(re.findall(reason, done.stdout, re.MULTILINE)) == counts.get("failed", 0) + counts.get("errors", 0)
