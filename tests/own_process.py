"""Tests that run in a process of their own, as part of any run: by a mark, or by their folder.

**By a mark.** `@pytest.mark.own_process` is for tests that measure the process they run in: its memory, its CPU time.
What earlier tests left behind, heaps with holes and threads that end late, is not theirs. All such tests of a file
share one process. `pytest -m own_process` runs them where it runs itself.

Either way the process selects tests by the marks that the run itself selects by (`scripts/check --all`).

**By their folder.** The fake device is registered with torch for the rest of a process. A folder of tests that need it
has a `conftest.py` with

    @pytest.hookimpl(trylast=True)
    def pytest_configure(config):
        own_process.register(config, __file__)

    def pytest_ignore_collect():
        return None if own_process.is_registered() else True

`pytest tests/that/folder`, or one of its files or tests, then registers the device and runs them as usual. A run of
anything else leaves them out; there, a test beside the folder calls `failures` once for each of the files, so that
they are part of a run of everything too. Each file gets a process of its own: the files can then run side by side.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[1]
MARK = "own_process"
PATTERN = "test_*.py"
TIMEOUT_SECONDS = 1800

_registered: list[Path] = []


class Outcome(NamedTuple):
    """What a process told of one of its tests. problem: empty if it passed or was skipped."""

    name: str  # with its parameters
    problem: str
    skipped: bool


def register(config: pytest.Config, conftest: str) -> None:
    """Install the device if this process runs tests of the folder only."""
    folder = Path(conftest).parent
    wanted = [Path(config.invocation_params.dir, argument.partition("::")[0]).resolve() for argument in config.args]
    if all(path.is_relative_to(folder) for path in wanted):
        os.environ["TORCHDYNAMO_DISABLE"] = "1"  # what libraries compile takes longer than all tests together
        from tests.fake_device import backend

        backend.install()
        _registered.append(folder)


def is_registered() -> bool:
    return bool(_registered)


def modules(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob(PATTERN))


@cache
def _run(path: Path, expression: str) -> tuple[list[Outcome], str]:
    """Run the tests of a file whose marks match: (one outcome for each, what pytest printed)."""
    command = [sys.executable, "-m", "pytest", str(path), "-m", expression, "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [*command, "--junitxml=/dev/stderr"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    outcomes = []
    start = done.stderr.find("<?xml")
    for case in ElementTree.fromstring(done.stderr[start:]).iter("testcase") if start >= 0 else ():
        problems = [*case.findall("failure"), *case.findall("error")]
        text = "\n".join(f"{case.get('name')}:\n{problem.text or problem.get('message')}" for problem in problems)
        outcomes.append(Outcome(case.get("name", ""), text, case.find("skipped") is not None))
    return outcomes, done.stdout + done.stderr[: max(start, 0)]


def failures(file: Path, config: pytest.Config) -> str:
    """What failed in a file of a folder; also if it has no test that ran. Empty if all is well."""
    outcomes, output = _run(file, config.getoption("markexpr"))
    found = [outcome.problem for outcome in outcomes]
    return "\n\n".join(filter(None, found)) if found else f"no test of {file.name} ran:\n{output[-4000:]}"


def run_if_marked(item: pytest.Function) -> bool:
    """Run a marked test elsewhere, unless this is the run of marked tests; False: it is to be run here."""
    expression = str(item.config.getoption("markexpr"))
    if item.get_closest_marker(MARK) is None or expression.startswith(MARK):
        return False
    outcomes, output = _run(item.path, f"{MARK} and ({expression})" if expression else MARK)
    found = [outcome for outcome in outcomes if outcome.name == item.name]
    if not found:
        pytest.fail(f"{item.name} did not run:\n{output[-4000:]}", pytrace=False)
    if found[0].problem:
        pytest.fail(found[0].problem, pytrace=False)
    if found[0].skipped:
        pytest.skip("in a process of its own")
    return True
