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
anything else leaves them out; there, a test beside the folder calls `failures` with the files, so that
they are part of a run of everything too. `shares` deals the files out to two processes, which can run side by side;
more of them would spend their time on imports.
"""

import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[1]
MARK = "own_process"
PATTERN = "test_*.py"
TIMEOUT_SECONDS = 7200  # of a process that hangs: on a busy machine the longest one takes half an hour

_registered: list[Path] = []


class Outcome(NamedTuple):
    """What a process told of one of its tests. problem: empty if it passed or was skipped."""

    module: str  # file name
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


def shares(folder: Path, count: int) -> list[tuple[str, ...]]:
    """Return the names of the files of a folder dealt out to `count` parts."""
    files = sorted(folder.glob(PATTERN))
    return [tuple(path.name for path in files[start::count]) for start in range(count)]


@cache
def _run(paths: tuple[Path, ...], expression: str) -> tuple[list[Outcome], str]:
    """Run the tests of files whose marks match: (one outcome for each, what pytest printed)."""
    options = ["-m", expression, "-p", "no:cacheprovider", "-p", "no:xdist"]
    command = [sys.executable, "-m", "pytest", *map(str, paths), *options]
    with tempfile.TemporaryDirectory() as folder:
        # A file, not stderr: a library that writes there while the process ends would make the report unreadable.
        report = Path(folder, "report.xml")
        done = subprocess.run(
            [*command, f"--junitxml={report}"],
            cwd=ROOT,
            env={name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"},  # which may need xdist
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
        cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    outcomes = []
    for case in cases:
        problems = [*case.findall("failure"), *case.findall("error")]
        text = "\n".join(f"{case.get('name')}:\n{problem.text or problem.get('message')}" for problem in problems)
        module = case.get("classname", "").rpartition(".")[2] + ".py"
        outcomes.append(Outcome(module, case.get("name", ""), text, case.find("skipped") is not None))
    return outcomes, f"{done.stdout}\nexit code {done.returncode}"


def failures(folder: Path, names: tuple[str, ...], config: pytest.Config) -> str:
    """Run files of a folder in one process; return the failures, also of a file none of whose tests ran."""
    outcomes, output = _run(tuple(folder / name for name in names), config.getoption("markexpr"))
    found = [outcome.problem for outcome in outcomes if outcome.problem]
    for name in set(names) - {outcome.module for outcome in outcomes}:
        found.append(f"no test of {name} ran:\n{output[-4000:]}")
    return "\n\n".join(found)


def run_if_marked(item: pytest.Function) -> bool:
    """Run a marked test elsewhere, unless this is the run of marked tests; False: it is to be run here."""
    expression = str(item.config.getoption("markexpr"))
    if item.get_closest_marker(MARK) is None or expression.startswith(MARK):
        return False
    outcomes, output = _run((item.path,), f"{MARK} and ({expression})" if expression else MARK)
    found = [outcome for outcome in outcomes if outcome.name == item.name]
    if not found:
        pytest.fail(f"{item.name} did not run:\n{output[-4000:]}", pytrace=False)
    if found[0].problem:
        pytest.fail(found[0].problem, pytrace=False)
    if found[0].skipped:
        pytest.skip("in a process of its own")
    return True
